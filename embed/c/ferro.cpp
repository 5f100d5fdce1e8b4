// The C interface: a handle, a plan, a picture.  What is thrown inside ends here.
#include "ferro.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits.h>
#include <math.h>
#include <memory>
#include <mutex>
#include <new>
#include <stdlib.h>
#include <string.h>
#include <thread>

#include "sampler.h"
#include "stage.h"
#include "status.h"
#include "tokenizer.h"

using namespace ferro_c;

namespace {

constexpr uint64_t PER_THREAD = 100 << 10; // bytes: stacks, as far as they are touched
constexpr uint64_t MAX_MANIFEST = 16 << 20;
constexpr uint32_t MAX_CHUNKS = 32;
constexpr double MAX_GUIDANCE = 50;
const char *const STAGES[FERRO_STAGES] = {"text_encoder", "text_encoder_2", "unet", "vae_decoder"};

uint32_t cores() { return std::clamp(std::thread::hardware_concurrency(), 1u, 64u); }

std::string mib(uint64_t bytes) { // rounded up, so that it can be given as a budget
    char text[32];
    snprintf(text, sizeof text, "%.1f MiB", double((bytes * 10 + (1 << 20) - 1) >> 20) / 10);
    return text;
}

bool runs(const char *isa) {
    for (uint32_t i = 0; ft_isa_name(i); i++)
        if (!strcmp(ft_isa_name(i), isa)) return ft_isa_supported(i) != 0;
    return false;
}

struct Request { // with what nobody said filled in
    std::string prompt, negative;
    uint64_t seed;
    uint32_t width, height;
    const Table *table;
    double guidance;
    bool two_passes;
    ferro_progress_callback progress;
    void *user;
    uint32_t chunks;
};

struct Prompt { // tokens by text encoder, and what the encoders say of them
    std::vector<Tokens> tokens;
    Floats states, pooled;
};

} // namespace

struct ferro {
    std::string folder;
    Mapping file;
    std::unique_ptr<Programs> programs;
    Machine machine;
    std::string isa;
    uint64_t budget;
    std::vector<Tokenizer> tokenizers;
    std::vector<uint64_t> arenas; // by program; 0: not asked for yet
    std::mutex mutex;
    std::atomic<int> cancelled{0};
    char message[FERRO_MESSAGE_BYTES] = "";

    void open(const char *bundle, const char *path, const ferro_options &options);
    Request read(const ferro_request &asked);
    Choice choose(uint32_t stage, const Request &request, uint64_t limit, uint64_t *smallest);
    void plan(const Request &request, Choice (&choices)[FERRO_STAGES], ferro_plan *out);
    void draw(const Request &request, uint8_t *rgb);

  private:
    std::string inside(const WeightFile &weights) const;
    void check_manifest() const;
    void check_weights(bool hash) const;
    const Table *table(const ferro_request &asked) const;
    std::vector<Tokens> tokens(const std::string &prompt, uint32_t *chunks) const;
    std::unique_ptr<Stage> stage(const Choice &choice) const;
    void report(const Request &request, ferro_progress progress) const;
    void encode(const Request &request, const Choice &choice, std::vector<Prompt *> prompts);
    Floats denoise(const Request &request, const Choice &choice, const Prompt &prompt,
                   const Prompt *negative);
    void decode(const Request &request, const Choice &choice, Floats latents, uint8_t *rgb);
    Floats guidance_embedding(double guidance) const;
};

// --- opening ------------------------------------------------------------------------------------

void ferro::open(const char *bundle, const char *path, const ferro_options &options) {
    if (options.threads > FT_MAX_THREADS)
        fail(FERRO_ARGUMENT, "threads is %u: it must be 1 to %d", options.threads, FT_MAX_THREADS);
    if (options.isa && !runs(options.isa))
        fail(FERRO_ARGUMENT, "this build or machine does not run %.60s", options.isa);
    isa = options.isa ? options.isa : "";
    machine = {options.threads ? options.threads : cores(), options.isa ? isa.c_str() : nullptr};
    budget = options.budget;
    folder = bundle;
    file = Mapping(path);
    programs.reset(new Programs(file.data(), file.bytes(), file.hash(Programs::HASHED)));
    arenas.resize(programs->programs.count);
    check_manifest();
    check_weights(options.verify != 0);
    for (const Encoder &encoder : programs->encoders) tokenizers.emplace_back(*programs, encoder);
    file.forget();
}

// The manifest holds the hash of every file, so that its own is the bundle's identity.
void ferro::check_manifest() const {
    const std::string path = folder + "/manifest.json";
    const Mapping manifest(path);
    if (manifest.bytes() > MAX_MANIFEST || manifest.hash() != programs->identity)
        fail(FERRO_FORMAT, "%.300s is of another bundle than the programs: compile it again",
             path.c_str());
}

std::string ferro::inside(const WeightFile &weights) const {
    const std::string path = folder + "/" + programs->spelled(weights.path);
    char root[PATH_MAX], found[PATH_MAX];
    if (!realpath(folder.c_str(), root) || !realpath(path.c_str(), found))
        fail(FERRO_FILE, "%.300s is missing: copy the bundle again", path.c_str());
    const size_t length = strlen(root);
    if (strncmp(root, found, length) || (found[length] != '/' && length > 1))
        fail(FERRO_FORMAT, "%.300s is a link that leaves the bundle", path.c_str());
    return path;
}

void ferro::check_weights(bool hash) const {
    for (const WeightFile &weights : programs->files) {
        const std::string path = inside(weights);
        const Mapping mapped(path);
        if (mapped.bytes() != weights.bytes)
            fail(FERRO_FORMAT, "%.300s should have %llu bytes and has %llu: copy it again",
                 path.c_str(), static_cast<unsigned long long>(weights.bytes),
                 static_cast<unsigned long long>(mapped.bytes()));
        if (hash && memcmp(mapped.hash().data(), weights.sha256, 32))
            fail(FERRO_FORMAT, "%.300s is damaged, its sha256 is another: copy it again",
                 path.c_str());
    }
}

// --- what is asked for --------------------------------------------------------------------------

const Table *ferro::table(const ferro_request &asked) const {
    const std::string sampler =
        asked.sampler ? asked.sampler : programs->spelled(programs->model->sampler);
    const uint32_t steps = asked.steps ? asked.steps : programs->model->steps;
    for (const Table &one : programs->tables)
        if (one.steps == steps && programs->spelled(one.sampler) == sampler) return &one;
    fail(FERRO_ARGUMENT,
         "no table of %u steps of %.60s was compiled: name them to `ferrotype compile`", steps,
         sampler.c_str());
}

std::vector<Tokens> ferro::tokens(const std::string &prompt, uint32_t *chunks) const {
    std::vector<Tokens> found;
    const uint32_t most = programs->model->flags & CHUNKS ? MAX_CHUNKS : 1;
    for (const Tokenizer &tokenizer : tokenizers) {
        found.push_back(tokenizer.chunks(prompt, most));
        *chunks = std::max(*chunks, found.back().chunks);
    }
    return found;
}

Request ferro::read(const ferro_request &asked) {
    const Model &model = *programs->model;
    Request r;
    r.prompt = asked.prompt ? asked.prompt : "";
    r.negative = asked.negative ? asked.negative : "";
    r.seed = asked.seed;
    r.width = asked.width || asked.height ? asked.width : model.width;
    r.height = asked.width || asked.height ? asked.height : model.height;
    r.table = table(asked);
    r.guidance = asked.guidance < 0 ? model.guidance : asked.guidance;
    if (!(r.guidance <= MAX_GUIDANCE))
        fail(FERRO_ARGUMENT, "guidance is %g: it must be from 0 to %g", r.guidance, MAX_GUIDANCE);
    const double scale = r.guidance != 0 ? r.guidance : 1;
    if (model.flags & LIMITED && !(model.guidance_low <= scale && scale <= model.guidance_high))
        fail(FERRO_ARGUMENT, "guidance is %g: this model was distilled for %g to %g", r.guidance,
             model.guidance_low, model.guidance_high);
    r.two_passes = r.guidance != 0 && r.guidance != 1 && !(model.flags & EMBEDS_GUIDANCE);
    if (!r.negative.empty() && !r.two_passes)
        fail(FERRO_ARGUMENT, "a negative prompt has no effect at guidance %g with this model",
             r.guidance);
    r.progress = asked.progress;
    r.user = asked.user;
    r.chunks = 1;
    tokens(r.prompt, &r.chunks);
    tokens(r.negative, &r.chunks);
    return r;
}

// --- the plan -----------------------------------------------------------------------------------

// The first way that fits, else the sparest; all ways are in the file, in the order of speed.
Choice ferro::choose(uint32_t stage, const Request &request, uint64_t limit, uint64_t *smallest) {
    Choice first, least;
    bool sized = false;
    for (const Offer &offer : programs->offers) {
        const Program &program = programs->programs[offer.program];
        if (program.component != stage) continue;
        if (program.width && (program.width != request.width || program.height != request.height))
            continue;
        sized = true;
        if (stage == FERRO_UNET && program.chunks != request.chunks) continue;
        if (offer.window && !ft_can_stream()) continue;
        uint64_t &arena = arenas[offer.program];
        if (!arena) arena = arena_bytes(*programs, program, machine);
        Choice choice;
        choice.offer = &offer;
        choice.program = &program;
        choice.arena = arena;
        choice.other = offer.other + PER_THREAD * machine.threads;
        if (!first.offer && (!limit || choice.peak() <= limit)) first = choice;
        if (!least.offer || choice.peak() < least.peak()) least = choice;
    }
    if (!least.offer && sized)
        fail(FERRO_PROMPT, "the prompt takes %u chunks: shorten it, or compile with --chunks %u",
             request.chunks, request.chunks);
    if (!least.offer)
        fail(FERRO_ARGUMENT, "%ux%u was not compiled: name it to `ferrotype compile --size`",
             request.width, request.height);
    *smallest = std::max(*smallest, least.peak());
    return first.offer ? first : least;
}

void ferro::plan(const Request &request, Choice (&choices)[FERRO_STAGES], ferro_plan *out) {
    uint64_t peak = 0, smallest = 0;
    uint32_t worst = 0;
    ferro_plan made;
    ferro_plan_init(&made);
    for (uint32_t i = 0; i < FERRO_STAGES; i++) {
        if (!programs->file(i)) continue;
        const Choice &choice = choices[i] = choose(i, request, budget, &smallest);
        made.stages[i] = {1,
                          choice.offer->window != 0,
                          choice.program->rows,
                          choice.offer->weights,
                          choice.arena,
                          choice.other,
                          choice.peak()};
        if (choice.peak() > peak) peak = choice.peak(), worst = i;
    }
    made.peak = peak;
    made.smallest = smallest;
    made.width = request.width, made.height = request.height;
    made.steps = request.table->steps;
    made.chunks = request.chunks;
    made.threads = machine.threads;
    if (out) {
        const size_t bytes = std::min(out->bytes, sizeof made);
        made.bytes = out->bytes;
        memcpy(out, &made, bytes);
    }
    if (budget && peak > budget)
        fail(FERRO_BUDGET, "%s needs at least %s for %ux%u, the budget is %s", STAGES[worst],
             mib(smallest).c_str(), request.width, request.height, mib(budget).c_str());
}

// --- the stages ---------------------------------------------------------------------------------

void ferro::report(const Request &request, ferro_progress progress) const {
    const Model &model = *programs->model;
    progress.width = request.width / model.side;
    progress.height = request.height / model.side;
    progress.channels = model.channels;
    if (request.progress && request.progress(request.user, &progress))
        fail(FERRO_CANCELLED, "cancelled");
    if (cancelled) fail(FERRO_CANCELLED, "cancelled");
}

std::unique_ptr<Stage> ferro::stage(const Choice &choice) const {
    const std::string path = inside(*programs->file(choice.program->component));
    std::unique_ptr<Stage> made(new Stage(*programs, path, choice, machine));
    file.forget(); // the engine has copies of what it needs
    return made;
}

// Weighted states of all chunks beside those of the encoder before, and the pooled ones of the
// first.
void ferro::encode(const Request &request, const Choice &choice, std::vector<Prompt *> prompts) {
    const uint32_t index = choice.program->component;
    const Encoder &encoder = *programs->encoder(index);
    const std::unique_ptr<Stage> running = stage(choice);
    for (Prompt *prompt : prompts) {
        Tokens &tokens = prompt->tokens[index];
        tokenizers[index].pad(tokens, request.chunks);
        const size_t chunk = size_t(encoder.length) * encoder.states;
        Floats states(chunk * request.chunks), joined;
        prompt->pooled.clear();
        for (uint32_t i = 0; i < request.chunks; i++) {
            running->write_ids(tokens.ids.data() + size_t(i) * encoder.length);
            running->run(&cancelled);
            running->read(STATES, states.data() + i * chunk);
            if (i || !encoder.pooled) continue;
            prompt->pooled.resize(encoder.pooled);
            running->read(POOLED_STATES, prompt->pooled.data());
        }
        weigh(states, tokens.weights, encoder.restore != 0);
        if (index == 0) {
            prompt->states.swap(states);
            continue;
        }
        const size_t before = encoder.states, first = programs->encoders[0].states;
        for (size_t t = 0; t < tokens.weights.size(); t++) {
            const auto a = prompt->states.begin() + ptrdiff_t(t * first);
            const auto b = states.begin() + ptrdiff_t(t * before);
            joined.insert(joined.end(), a, a + ptrdiff_t(first));
            joined.insert(joined.end(), b, b + ptrdiff_t(before));
        }
        prompt->states.swap(joined);
    }
    ferro_progress progress = {};
    progress.stage = index;
    report(request, progress);
}

// Sinusoids of the guidance scale, as latent consistency models were trained with (Luo et al.
// 2023).
Floats ferro::guidance_embedding(double guidance) const {
    const double scale = 1000 * (guidance - 1);
    Floats found;
    for (double frequency : programs->frequencies) found.push_back(float(sin(scale * frequency)));
    for (double frequency : programs->frequencies) found.push_back(float(cos(scale * frequency)));
    return found;
}

Floats ferro::denoise(const Request &request, const Choice &choice, const Prompt &prompt,
                      const Prompt *negative) {
    const Model &model = *programs->model;
    const float height = float(request.height), width = float(request.width);
    const float time_ids[6] = {height, width, 0, 0, height, width};
    const Floats condition = guidance_embedding(request.guidance);
    const std::unique_ptr<Stage> running = stage(choice);
    const auto run = [&](const Floats &x, float timestep, const Prompt &text, Floats &out) {
        running->write(SAMPLE, x.data()); // again: the arena may have been written upon
        running->write(TIMESTEP, &timestep);
        running->write(HIDDEN_STATES, text.states.data());
        if (model.flags & POOLED) running->write(TEXT_EMBEDS, text.pooled.data());
        if (model.flags & TIME_IDS) running->write(TIME_NUMBERS, time_ids);
        if (model.flags & EMBEDS_GUIDANCE) running->write(TIMESTEP_COND, condition.data());
        running->run(&cancelled);
        running->read(OUT_SAMPLE, out.data());
    };
    Floats unconditional;
    const auto predict = [&](const Floats &x, float timestep, Floats &out) {
        run(x, timestep, prompt, out);
        if (!negative) return;
        unconditional.resize(out.size());
        run(x, timestep, *negative, unconditional);
        const float scale = float(request.guidance);
        for (size_t i = 0; i < out.size(); i++) {
            const float product = scale * (out[i] - unconditional[i]);
            out[i] = unconditional[i] + product;
        }
    };
    const auto stepped = [&](uint32_t step, const Floats &x, const Floats &denoised) {
        ferro_progress progress = {};
        progress.stage = FERRO_UNET;
        progress.step = step;
        progress.steps = request.table->rows;
        progress.latents = x.data();
        progress.denoised = denoised.data();
        report(request, progress);
    };
    const size_t count =
        size_t(model.channels) * (request.width / model.side) * (request.height / model.side);
    Noise noise(request.seed);
    return sample(*programs, *request.table, count, noise, predict, stepped);
}

namespace {

uint8_t pixel_of(float x) { // from -1..1
    const float y = std::min(std::max(x / 2 + 0.5f, 0.0f), 1.0f) * 255.0f;
    return uint8_t(rintf(y));
}

} // namespace

void ferro::decode(const Request &request, const Choice &choice, Floats latents, uint8_t *rgb) {
    for (float &value : latents) value = value / programs->model->scaling;
    const std::unique_ptr<Stage> running = stage(choice);
    running->write(LATENT_SAMPLE, latents.data());
    running->run(&cancelled);
    const size_t pixels = size_t(request.width) * request.height;
    Floats copied;
    const float *planes = running->plane(PICTURE);
    if (!planes) {
        copied.resize(3 * pixels);
        running->read(PICTURE, copied.data());
        planes = copied.data();
    }
    for (size_t i = 0; i < pixels; i++)
        for (size_t c = 0; c < 3; c++) {
            const float value = planes[c * pixels + i];
            if (!isfinite(value))
                fail(FERRO_NUMBERS, "the vae_decoder returned NaN or Inf: convert with "
                                    "--activations fp32");
            rgb[3 * i + c] = pixel_of(value);
        }
    ferro_progress progress = {};
    progress.stage = FERRO_DECODER;
    report(request, progress);
}

void ferro::draw(const Request &request, uint8_t *rgb) {
    Choice choices[FERRO_STAGES];
    plan(request, choices, nullptr);
    uint32_t chunks = 1;
    Prompt prompt, negative;
    prompt.tokens = tokens(request.prompt, &chunks);
    const bool zeros = programs->model->flags & ZERO_NEGATIVE && request.negative.empty();
    std::vector<Prompt *> prompts = {&prompt};
    if (request.two_passes && !zeros) {
        negative.tokens = tokens(request.negative, &chunks);
        prompts.push_back(&negative);
    }
    for (const Encoder &encoder : programs->encoders)
        encode(request, choices[encoder.component], prompts);
    if (request.two_passes && zeros) {
        negative.states.assign(prompt.states.size(), 0.0f);
        negative.pooled.assign(prompt.pooled.size(), 0.0f);
    }
    Floats latents =
        denoise(request, choices[FERRO_UNET], prompt, request.two_passes ? &negative : nullptr);
    decode(request, choices[FERRO_DECODER], std::move(latents), rgb);
}

// --- the C interface ----------------------------------------------------------------------------

namespace {

void put(char *message, size_t bytes, const char *text) {
    if (message && bytes) snprintf(message, bytes, "%s", text);
}

// Run a function; what it throws becomes a status and a message.
int guarded(char *message, size_t bytes, const std::function<void()> &run) {
    try {
        run();
        return FERRO_OK;
    } catch (const Error &error) {
        put(message, bytes, error.text);
        return error.status;
    } catch (const std::exception &error) {
        put(message, bytes, error.what());
        return FERRO_MEMORY;
    } catch (...) {
        put(message, bytes, "unknown");
        return FERRO_MEMORY;
    }
}

// The caller's structure, in this version's size: what an older caller does not have is default.
template <class T> T widened(const T *given, void (*init)(T *)) {
    T full;
    init(&full);
    if (!given) return full;
    if (given->bytes < sizeof(size_t))
        fail(FERRO_ARGUMENT, "a structure was not initialised: call its init function");
    memcpy(static_cast<void *>(&full), given, std::min(given->bytes, sizeof full));
    return full;
}

int on(ferro *handle, const std::function<void()> &run) {
    if (!handle) return FERRO_ARGUMENT;
    return guarded(nullptr, 0, [&] {
        const std::lock_guard<std::mutex> lock(handle->mutex);
        char message[FERRO_MESSAGE_BYTES] = "";
        const int status = guarded(message, sizeof message, run);
        if (status == FERRO_OK) return;
        memcpy(handle->message, message, sizeof message);
        throw Error{status, ""};
    });
}

} // namespace

uint32_t ferro_abi(void) { return FERRO_ABI; }

void ferro_options_init(ferro_options *options) {
    *options = {};
    options->bytes = sizeof *options;
}

void ferro_request_init(ferro_request *request) {
    *request = {};
    request->bytes = sizeof *request;
    request->guidance = -1;
}

void ferro_plan_init(ferro_plan *plan) {
    *plan = {};
    plan->bytes = sizeof *plan;
}

int ferro_open(const char *bundle, const char *programs, const ferro_options *options,
               ferro **handle, char *message, size_t message_bytes) {
    if (handle) *handle = nullptr;
    return guarded(message, message_bytes, [&] {
        if (!bundle || !programs || !handle) fail(FERRO_ARGUMENT, "no bundle, programs or handle");
        std::unique_ptr<ferro> made(new ferro);
        made->open(bundle, programs, widened(options, ferro_options_init));
        *handle = made.release();
    });
}

void ferro_close(ferro *handle) { delete handle; }

const char *ferro_message(const ferro *handle) { return handle ? handle->message : "no handle"; }

int ferro_make_plan(ferro *handle, const ferro_request *request, ferro_plan *plan) {
    return on(handle, [&] {
        if (!plan || plan->bytes < sizeof(size_t)) fail(FERRO_ARGUMENT, "no plan to fill in");
        Choice choices[FERRO_STAGES];
        handle->plan(handle->read(widened(request, ferro_request_init)), choices, plan);
    });
}

int ferro_generate(ferro *handle, const ferro_request *request, uint8_t *rgb, size_t rgb_bytes) {
    return on(handle, [&] {
        handle->cancelled = 0;
        const Request read = handle->read(widened(request, ferro_request_init));
        const uint64_t needed = uint64_t(read.width) * read.height * 3;
        if (!rgb || rgb_bytes < needed)
            fail(FERRO_ARGUMENT, "the picture has %llu bytes, there is room for %zu",
                 static_cast<unsigned long long>(needed), rgb ? rgb_bytes : 0);
        handle->draw(read, rgb);
    });
}

void ferro_cancel(ferro *handle) {
    if (handle) handle->cancelled = 1;
}

int ferro_preview(const ferro *handle, const ferro_progress *progress, uint8_t *rgb,
                  size_t rgb_bytes) {
    if (!handle || !progress || !progress->denoised || !rgb ||
        progress->channels != handle->programs->model->channels)
        return FERRO_ARGUMENT;
    const size_t pixels = size_t(progress->width) * progress->height;
    if (rgb_bytes < 3 * pixels) return FERRO_ARGUMENT;
    const Section<float> &weights = handle->programs->preview; // a row by channel, then the bias
    for (size_t i = 0; i < pixels; i++)
        for (size_t k = 0; k < 3; k++) {
            float value = 0;
            for (size_t c = 0; c < progress->channels; c++)
                value += progress->denoised[c * pixels + i] * weights[3 * c + k];
            rgb[3 * i + k] = pixel_of(value + weights[3 * uint64_t(progress->channels) + k]);
        }
    return FERRO_OK;
}

int ferro_tokenize(ferro *handle, uint32_t stage, const char *prompt, uint32_t most, int32_t *ids,
                   float *weights, uint32_t *chunks, int *dropped) {
    return on(handle, [&] {
        if (!prompt || !ids || !weights || !chunks || !most || most > MAX_CHUNKS ||
            stage >= handle->tokenizers.size())
            fail(FERRO_ARGUMENT, "no prompt, no room, or no such text encoder");
        const Tokens found = handle->tokenizers[stage].chunks(prompt, most);
        std::copy(found.ids.begin(), found.ids.end(), ids);
        std::copy(found.weights.begin(), found.weights.end(), weights);
        *chunks = found.chunks;
        if (dropped) *dropped = found.dropped;
    });
}

uint32_t ferro_chunk_tokens(const ferro *handle) { return handle ? handle->programs->length() : 0; }

int ferro_noise(uint64_t seed, float *values, size_t count) {
    if (!values || count < Noise::LEAST) return FERRO_ARGUMENT;
    Noise(seed).draw(values, count);
    return FERRO_OK;
}
