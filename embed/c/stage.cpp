#include "stage.h"

#include <algorithm>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "internal.h"
#include "status.h"

namespace ferro_c {

// --- memory -------------------------------------------------------------------------------------

Mapping::Mapping(const std::string &path) {
    file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe would wait for ever
    if (file < 0) fail(FERRO_FILE, "%.300s: %s", path.c_str(), strerror(errno));
    struct stat found;
    const bool plain = !fstat(file, &found) && S_ISREG(found.st_mode) && found.st_size > 0;
    void *const mapped =
        plain ? mmap(nullptr, size_t(found.st_size), PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    if (mapped == MAP_FAILED) {
        close(file);
        file = -1;
        fail(FERRO_FILE, "%.300s is empty, or no file that can be mapped", path.c_str());
    }
    at = static_cast<char *>(mapped);
    size = uint64_t(found.st_size);
}

Mapping Mapping::memory(uint64_t bytes) {
    void *const mapped =
        mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED)
        fail(FERRO_MEMORY, "the system has no %llu bytes for activations",
             static_cast<unsigned long long>(bytes));
    Mapping made;
    made.at = static_cast<char *>(mapped);
    made.size = bytes;
    return made;
}

Mapping::Mapping(Mapping &&other) noexcept { *this = std::move(other); }

Mapping &Mapping::operator=(Mapping &&other) noexcept {
    std::swap(at, other.at);
    std::swap(size, other.size);
    std::swap(file, other.file);
    return *this;
}

Mapping::~Mapping() {
    if (at) munmap(at, size_t(size));
    if (file >= 0) close(file);
}

bool Mapping::unchanged() const {
    struct stat found;
    return file < 0 || (!fstat(file, &found) && uint64_t(found.st_size) == size);
}

Digest Mapping::hash(uint64_t from) const {
    std::vector<char> piece(1 << 16);
    Sha256 hash;
    while (from < size) {
        const size_t wanted = size_t(std::min<uint64_t>(piece.size(), size - from));
        const ssize_t got = pread(file, piece.data(), wanted, off_t(from));
        if (got <= 0) fail(FERRO_FILE, "a file changed while it was read");
        hash.add(piece.data(), size_t(got));
        from += uint64_t(got);
    }
    return hash.finish();
}

void Mapping::forget() const { madvise(at, size_t(size), MADV_DONTNEED); }

// --- programs -----------------------------------------------------------------------------------

uint64_t arena_bytes(const Programs &programs, const Program &program, const Machine &machine) {
    constexpr uint64_t MOST = uint64_t(1) << 40;
    uint64_t bytes = program.arena;
    for (uint64_t i = 0; i < program.op_count; i++) {
        const ft_op &op = programs.ops[program.op + i];
        const uint64_t scratch = ft_op_scratch(&op, machine.threads, machine.isa);
        if (scratch > MOST || op.scratch > program.arena)
            fail(FERRO_FORMAT, "op %llu of stage %u is malformed: compile the bundle again",
                 static_cast<unsigned long long>(i), program.component);
        bytes = std::max(bytes, op.scratch + scratch);
    }
    return bytes;
}

Stage::Stage(const Programs &file, const std::string &path, const Choice &choice,
             const Machine &machine)
    : programs(file), program(*choice.program), weights(path),
      arena(Mapping::memory(choice.arena)) {
    const WeightFile &expected = *programs.file(program.component);
    if (weights.bytes() != expected.bytes)
        fail(FERRO_FORMAT, "%.300s has %llu bytes, the bundle's has %llu: copy it again",
             path.c_str(), static_cast<unsigned long long>(weights.bytes()),
             static_cast<unsigned long long>(expected.bytes));
    char message[256] = "";
    engine.reset(ft_program_create(programs.ops.data + program.op, program.op_count, arena.bytes(),
                                   weights.bytes(), machine.threads, machine.isa, message,
                                   sizeof message));
    if (!engine)
        fail(strstr(message, "cannot start") ? FERRO_MEMORY : FERRO_FORMAT, "stage %u: %s",
             program.component, message);
    const uint64_t window = choice.offer->window;
    if (window && ft_program_stream(engine.get(), programs.ranges.data + program.range,
                                    program.range_count, window, message, sizeof message))
        fail(FERRO_FORMAT, "stage %u: %s", program.component, message);
}

void Stage::run(const std::atomic<int> *cancel) {
    static_assert(sizeof *cancel == sizeof(int), "the engine reads it as an int");
    const auto *const flag = reinterpret_cast<const volatile int *>(cancel);
    const size_t done = ft_program_run(engine.get(), arena.data(), weights.data(), nullptr, flag);
    if (cancel && *cancel) fail(FERRO_CANCELLED, "cancelled");
    if (done < program.op_count || !weights.unchanged())
        fail(FERRO_FILE,
             "the weights of stage %u changed while they were read: copy the bundle again",
             program.component);
}

// --- arrays -------------------------------------------------------------------------------------

void Stage::write_ids(const int32_t *ids) {
    const Port &port = *programs.port(program, INPUT_IDS);
    memcpy(arena.data() + port.offset, ids, port.total * sizeof *ids);
}

void Stage::write(uint32_t name, const float *values) {
    const Port &port = *programs.port(program, name);
    char *const to = arena.data() + port.offset;
    const auto shifted = [&](uint64_t i) {
        return port.shift != 0 ? values[i] + port.shift : values[i];
    };
    if (port.planar) {
        for (uint64_t i = 0; i < port.total; i++) {
            const float value = shifted(i);
            memcpy(to + i * sizeof value, &value, sizeof value);
        }
        return;
    }
    const uint64_t bytes = port.type == FT_F32 ? 4 : 2;
    for (uint64_t p = 0; p < port.pixels; p++) {
        char *const pixel = to + p * port.pixel * bytes;
        memset(pixel, 0, port.pixel * bytes);
        for (uint64_t c = 0; c < port.channels; c++) {
            const float value = shifted(p * port.channels + c);
            const uint16_t half =
                port.type == FT_BF16 ? ft::float_to_bf16(value) : ft::float_to_f16(value);
            memcpy(pixel + c * bytes, bytes == 4 ? static_cast<const void *>(&value) : &half,
                   bytes);
        }
    }
}

void Stage::read(uint32_t name, float *values) const {
    const Port &port = *programs.port(program, name);
    const char *const from = arena.data() + port.offset;
    if (port.planar) {
        const uint64_t count = uint64_t(port.channels) * port.pixels;
        memcpy(values, from, count * sizeof *values);
        std::fill(values + count, values + port.total, port.shift);
        return;
    }
    const uint64_t bytes = port.type == FT_F32 ? 4 : 2;
    for (uint64_t p = 0; p < port.pixels; p++)
        for (uint64_t c = 0; c < port.channels; c++) {
            const char *const element = from + (p * port.pixel + c) * bytes;
            float value;
            uint16_t half;
            memcpy(bytes == 4 ? static_cast<void *>(&value) : &half, element, bytes);
            if (bytes == 2)
                value = port.type == FT_BF16 ? ft::bf16_to_float(half) : ft::f16_to_float(half);
            values[p * port.channels + c] = value;
        }
}

const float *Stage::plane(uint32_t name) const {
    const Port &port = *programs.port(program, name);
    const bool whole = port.planar && uint64_t(port.channels) * port.pixels == port.total;
    return whole ? reinterpret_cast<const float *>(arena.data() + port.offset) : nullptr;
}

} // namespace ferro_c
