#include "programs.h"

#include <math.h>
#include <string.h>

#include "status.h"

namespace ferro_c {
namespace {

constexpr char MAGIC[8] = {'F', 'E', 'R', 'R', 'O', 'C', '1', '\n'};
constexpr uint32_t VERSION = 1, SECTIONS = 16;
constexpr uint32_t MAX_SIDE = 1 << 16, MAX_LENGTH = 1 << 16, MAX_CHANNELS = 1 << 16,
                   MAX_CHUNKS = 32;
constexpr uint32_t SYMBOLS = 512; // of an encoder
constexpr uint64_t MAX_ARENA = uint64_t(1) << 40;

struct Place {
    uint64_t offset, count;
};

struct Header {
    char magic[8];
    uint8_t sha256[32]; // of all that follows
    uint32_t version, op_bytes, abi, sections;
    uint64_t bytes;
    uint8_t identity[32];
    Place places[SECTIONS];
};

static_assert(sizeof(Header) == 96 + 16 * SECTIONS && sizeof(Model) == 88 &&
                  sizeof(Encoder) == 56 && sizeof(WeightFile) == 56 && sizeof(Program) == 72 &&
                  sizeof(Offer) == 32 && sizeof(Port) == 48 && sizeof(Table) == 24 &&
                  sizeof(Row) == 36,
              "records lie in the file as in memory");

const Header &header_of(const uint8_t *data) { return *reinterpret_cast<const Header *>(data); }

__attribute__((format(printf, 2, 3))) void require(bool holds, const char *format, ...) {
    if (holds) return;
    char reason[FERRO_MESSAGE_BYTES];
    va_list values;
    va_start(values, format);
    vsnprintf(reason, sizeof reason, format, values);
    va_end(values);
    fail(FERRO_FORMAT,
         "the file of programs is damaged or of another version: %.300s; compile the "
         "bundle again",
         reason);
}

uint64_t type_size(uint32_t type) { return type == FT_F32 || type == FT_I32 ? 4 : 2; }

bool is_plain(const std::string &path) { // inside of the bundle on every system
    if (path.empty() || path.size() > 200 || path[0] == '/') return false;
    size_t start = 0;
    for (size_t i = 0; i <= path.size(); i++) {
        if (i < path.size() && (path[i] <= ' ' || path[i] > '~' || strchr("\\:*?\"<>|", path[i])))
            return false;
        if (i < path.size() && path[i] != '/') continue;
        if (i == start || path[start] == '.') return false;
        start = i + 1;
    }
    return true;
}

} // namespace

template <class T> void Programs::take(Section<T> &section, const char *name) {
    const Place &place = header_of(start).places[taken++];
    require(place.offset % 64 == 0 && place.offset >= sizeof(Header) && place.offset <= size &&
                place.count <= (size - place.offset) / sizeof(T),
            "%s end past it", name);
    section.data = reinterpret_cast<const T *>(start + place.offset);
    section.count = place.count;
}

Programs::Programs(const void *data, uint64_t bytes, const Digest &hash)
    : start(static_cast<const uint8_t *>(data)), size(bytes) {
    require(size >= sizeof(Header) && !memcmp(start, MAGIC, sizeof MAGIC), "it is none");
    const Header &header = header_of(start);
    require(header.version == VERSION && header.abi == FT_ABI && header.sections == SECTIONS &&
                header.op_bytes == sizeof(ft_op),
            "it is of version %u for engine %u, this library reads %u for %d", header.version,
            header.abi, VERSION, FT_ABI);
    require(header.bytes == size, "it should have %llu bytes and has %llu",
            static_cast<unsigned long long>(header.bytes), static_cast<unsigned long long>(size));
    static_assert(HASHED == sizeof header.magic + sizeof header.sha256, "the hash is of the rest");
    require(!memcmp(hash.data(), header.sha256, 32), "its sha256 is another");
    memcpy(identity.data(), header.identity, 32);
    take(text, "texts"), take(models, "models"), take(encoders, "encoders"), take(added, "tokens");
    take(merges, "merges"), take(frequencies, "frequencies"), take(preview, "preview");
    take(files, "files"), take(programs, "programs"), take(offers, "offers"), take(ports, "ports");
    take(ops, "ops"), take(ranges, "ranges"), take(tables, "tables"), take(rows, "rows");
    take(symbols, "symbols");
    check_model();
    for (const Encoder &one : encoders) check_encoder(one);
    for (const Added &one : added)
        require(text.holds(one.text.at, one.text.bytes) && one.text.bytes && one.id != NONE,
                "a token has no text");
    for (const WeightFile &one : files)
        require(one.component < FERRO_STAGES && text.holds(one.path.at, one.path.bytes) &&
                    is_plain(spelled(one.path)) && one.bytes <= MAX_ARENA,
                "a path of weights leaves the bundle");
    for (const Program &one : programs) check_program(one);
    for (const Offer &one : offers)
        require(one.program < programs.count && one.window <= MAX_ARENA &&
                    one.weights <= MAX_ARENA && one.other <= MAX_ARENA,
                "an offer is of no program");
    for (const Table &one : tables)
        require(text.holds(one.sampler.at, one.sampler.bytes) && one.rows &&
                    rows.holds(one.row, one.rows),
                "a sampler table has no rows");
}

void Programs::check_model() const {
    require(models.count == 1, "it has %llu models", static_cast<unsigned long long>(models.count));
    const_cast<Programs *>(this)->model = models.data;
    const Model &m = *model;
    require(m.channels >= 1 && m.channels <= 64 && m.side >= 1 && m.side <= 128, "latents");
    require(m.states && m.states <= MAX_CHANNELS && m.pooled <= MAX_CHANNELS &&
                m.condition <= MAX_CHANNELS && m.condition == 2 * frequencies.count,
            "channels");
    require(text.holds(m.sampler.at, m.sampler.bytes) && text.holds(m.name.at, m.name.bytes),
            "names");
    require(isfinite(m.scaling) && m.scaling != 0, "the scaling factor");
    require(preview.count == 3 * (uint64_t(m.channels) + 1), "the preview");
    require(encoders.count >= 1 && encoders.count <= 2 && encoders[0].component == FERRO_TEXT &&
                encoders[encoders.count - 1].component == encoders.count - 1,
            "text encoders");
    require(symbols.count == SYMBOLS * encoders.count, "symbols");
    const bool pooled = m.flags & POOLED, embeds = m.flags & EMBEDS_GUIDANCE;
    require(pooled == (m.pooled != 0) && embeds == (m.condition != 0), "inputs of the unet");
    require(!pooled || m.pooled == encoders[encoders.count - 1].pooled, "pooled states");
    uint64_t states = 0;
    for (const Encoder &one : encoders) states += one.states;
    require(states == m.states, "states");
    for (uint32_t i = 0; i < FERRO_STAGES; i++)
        require(i == FERRO_TEXT_2 && encoders.count == 1 ? !file(i) : file(i) != nullptr,
                "stage %u has no weights", i);
}

void Programs::check_encoder(const Encoder &one) const {
    require(one.length >= 3 && one.length <= MAX_LENGTH && one.length == length(), "chunks");
    require(one.states && one.states <= MAX_CHANNELS && one.pooled <= MAX_CHANNELS, "states");
    require(added.holds(one.added, one.added_count) && merges.holds(one.merges, one.merge_count),
            "merges");
    for (uint32_t i = 1; i < one.merge_count; i++) {
        const Merge &a = merges[one.merges + i - 1], &b = merges[one.merges + i];
        require(a.left < b.left || (a.left == b.left && a.right < b.right), "merges out of order");
    }
}

// How many elements an array must have there.
uint64_t Programs::elements(const Program &program, uint32_t name) const {
    const uint64_t pixels = uint64_t(program.width) * program.height;
    const uint64_t latents = pixels / model->side / model->side * model->channels;
    const Encoder *text_encoder =
        program.component <= FERRO_TEXT_2 ? encoder(program.component) : nullptr;
    switch (name) {
    case INPUT_IDS: return length();
    case STATES: return uint64_t(length()) * (text_encoder ? text_encoder->states : 0);
    case POOLED_STATES: return text_encoder ? text_encoder->pooled : 0;
    case SAMPLE:
    case LATENT_SAMPLE:
    case OUT_SAMPLE: return latents;
    case TIMESTEP: return 1;
    case HIDDEN_STATES: return uint64_t(length()) * program.chunks * model->states;
    case TEXT_EMBEDS: return model->pooled;
    case TIME_NUMBERS: return 6;
    case TIMESTEP_COND: return model->condition;
    case PICTURE: return 3 * pixels;
    }
    return 0;
}

void Programs::check_port(const Program &program, const Port &one) const {
    require(one.name < PORT_NAMES && one.total == elements(program, one.name), "array %u",
            one.name);
    require(one.out == (one.name >= STATES), "the direction of array %u", one.name);
    const bool numbers = one.type == FT_F32 || one.type == FT_BF16 || one.type == FT_F16;
    require(one.name == INPUT_IDS ? one.type == FT_I32 && one.planar : numbers,
            "array %u is of type %u", one.name, one.type);
    require(!one.planar || type_size(one.type) == 4, "array %u is of type %u", one.name, one.type);
    require(one.channels && one.pixels && one.channels <= MAX_CHANNELS &&
                one.pixels <= MAX_SIDE * uint64_t(MAX_SIDE) && one.pixel <= 2 * MAX_CHANNELS,
            "array %u", one.name);
    const uint64_t dense = uint64_t(one.channels) * one.pixels;
    const bool whole = dense == one.total || (one.out && one.planar && dense < one.total);
    require(whole && (one.planar || one.pixel >= one.channels), "array %u has holes", one.name);
    const uint64_t stored = one.planar ? dense : uint64_t(one.pixel) * one.pixels;
    const uint64_t bytes = stored * type_size(one.type);
    require(one.offset % 4 == 0 && one.offset <= program.arena &&
                bytes <= program.arena - one.offset,
            "array %u ends past the arena", one.name);
}

void Programs::check_program(const Program &one) const {
    require(one.component < FERRO_STAGES && file(one.component), "a program is of no stage");
    require(one.arena && one.arena <= MAX_ARENA && one.arena % 64 == 0, "an arena");
    require(one.op_count && ops.holds(one.op, one.op_count) &&
                ranges.holds(one.range, one.range_count) && ports.holds(one.port, one.port_count) &&
                one.port_count <= PORT_NAMES,
            "a program has no ops");
    const bool image = one.component >= FERRO_UNET;
    require(!image || (one.width && one.height && one.width <= MAX_SIDE && one.height <= MAX_SIDE &&
                       one.width % model->side == 0 && one.height % model->side == 0),
            "a program's size");
    require(!image ||
                uint64_t(one.width) * one.height / model->side / model->side * model->channels >=
                    16, // the smallest draw of noise
            "a program's size");
    require(one.chunks >= 1 && one.chunks <= MAX_CHUNKS, "a program's chunks");
    const uint32_t optional = (model->flags & POOLED ? 1u << TEXT_EMBEDS : 0) |
                              (model->flags & TIME_IDS ? 1u << TIME_NUMBERS : 0) |
                              (model->flags & EMBEDS_GUIDANCE ? 1u << TIMESTEP_COND : 0);
    const Encoder *reads = image ? nullptr : encoder(one.component);
    const uint32_t text_ports =
        1u << INPUT_IDS | 1u << STATES | (reads && reads->pooled ? 1u << POOLED_STATES : 0);
    const uint32_t wanted[FERRO_STAGES] = {text_ports, text_ports,
                                           1u << SAMPLE | 1u << TIMESTEP | 1u << HIDDEN_STATES |
                                               1u << OUT_SAMPLE | optional,
                                           1u << LATENT_SAMPLE | 1u << PICTURE};
    uint32_t found = 0;
    for (uint32_t i = 0; i < one.port_count; i++) {
        const Port &entry = ports[one.port + i];
        check_port(one, entry);
        require(!(found & 1u << entry.name), "array %u is there twice", entry.name);
        found |= 1u << entry.name;
    }
    require(found == wanted[one.component], "the arrays of stage %u", one.component);
}

const Encoder *Programs::encoder(uint32_t component) const {
    for (const Encoder &one : encoders)
        if (one.component == component) return &one;
    return nullptr;
}

const WeightFile *Programs::file(uint32_t component) const {
    for (const WeightFile &one : files)
        if (one.component == component) return &one;
    return nullptr;
}

const Port *Programs::port(const Program &program, uint32_t name) const {
    for (uint32_t i = 0; i < program.port_count; i++)
        if (ports[program.port + i].name == name) return &ports[program.port + i];
    return nullptr;
}

} // namespace ferro_c
