// The executor: every op is checked against the arena and the weights once, then run in order.
#include <chrono>
#include <cstdio>
#include <memory>
#include <new>
#include <vector>

#include "internal.h"
#include "stream.h"

namespace ft {

// --- the table of ops ---------------------------------------------------------------------------

const Op *find_op(uint32_t kind) {
    static const Op *const ops[] = {
        nullptr,       &matmul_op,   &group_norm_op, &layer_norm_op, &attention_op,
        &embedding_op, &sinusoid_op, &unary_op,      &add_op,        &load_op,
        &store_op,     &bytes_op,    &pick_op,       &moments_op,    &affine_op,
    };
    return kind < sizeof ops / sizeof *ops ? ops[kind] : nullptr;
}

void zero_border(const ft_op &op, const Context &context) {
    const ft_tensor &t = op.out;
    if (!t.border) return;
    const int64_t pixel = padded(t.c) * type_bytes(t.type);
    const int64_t h = t.h, w = t.w;
    const auto clear = [&](int64_t y, int64_t x) { memset(context.at(t, y, x), 0, pixel); };
    for (int64_t x = -1; x <= w; x++) {
        if (!(op.band & 1)) clear(-1, x);
        if (!(op.band & 2)) clear(h, x);
    }
    for (int64_t y = 0; y < h; y++) clear(y, -1), clear(y, w);
}

namespace {

// --- checks -------------------------------------------------------------------------------------

constexpr uint32_t MAX_SIDE = 1 << 20, MAX_CHANNELS = 1 << 20;
constexpr int64_t MAX_PIXELS = int64_t(1) << 34;
constexpr uint64_t UNBOUNDED = UINT64_MAX >> 1; // for ops that have no place yet

enum class Layout { CHANNELS, PLANES, DENSE, ABSENT };

struct Slots { // which layout each tensor of a kind has; b, c and add may be absent all the same
    Layout out, a, b, c, add;
};

const Slots &slots(uint32_t kind) {
    constexpr Layout C = Layout::CHANNELS, P = Layout::PLANES, D = Layout::DENSE,
                     N = Layout::ABSENT;
    static const Slots table[] = {
        {N, N, N, N, N}, {C, C, C, C, C}, {C, C, C, N, N}, {C, C, N, N, N}, {C, C, C, C, N},
        {C, D, N, N, N}, {C, D, N, N, N}, {C, C, N, N, N}, {C, C, C, N, N}, {C, P, N, N, N},
        {P, C, N, N, N}, {D, C, N, N, N}, {C, C, D, N, N}, {C, C, N, N, N}, {C, C, C, N, N},
    };
    return table[kind];
}

bool must_have_b(uint32_t kind) {
    return kind == FT_ATTENTION || kind == FT_ADD || kind == FT_PICK || kind == FT_AFFINE;
}

// Null, or what is wrong with a tensor on its own and against an arena of so many bytes.
const char *check_tensor(const ft_tensor &t, Layout layout, bool needed, uint64_t arena) {
    static const ft_tensor nothing = {};
    if (!t.h)
        return needed ? "is missing" : memcmp(&t, &nothing, sizeof t) ? "is half there" : nullptr;
    if (layout == Layout::ABSENT) return "does not belong to this kind";
    if (t.type > FT_U8) return "has an unknown type";
    if (!t.w || !t.c || t.h > MAX_SIDE || t.w > MAX_SIDE || t.c > MAX_CHANNELS ||
        int64_t(t.h) * t.w > MAX_PIXELS / t.c)
        return "has an impossible size";
    const uint64_t size = type_bytes(t.type);
    if (t.offset % (size < 4 ? size : 4)) return "is not aligned";
    if (layout != Layout::CHANNELS) {
        const bool planes = layout == Layout::PLANES;
        const uint64_t area = uint64_t(t.h) * t.w;
        if (t.border || t.row != uint64_t(planes ? 1 : t.c) * t.w ||
            (planes ? t.pixel < area : t.pixel != t.c))
            return "is not dense";
        const uint64_t bytes = (planes ? (t.c - 1) * uint64_t(t.pixel) + area : area * t.c) * size;
        return t.offset > arena || bytes > arena - t.offset ? "ends past the arena" : nullptr;
    }
    if (t.type > FT_F16) return "has a type that images cannot have";
    if (t.border > 1) return "has a border that is neither 0 nor 1";
    const uint64_t across = t.w + 2 * uint64_t(t.border);
    if (t.pixel < uint64_t(padded(t.c)) || t.row < across * t.pixel) return "overlaps itself";
    const uint64_t before = t.border * (uint64_t(t.row) + t.pixel) * size;
    const uint64_t after = ((t.h - 1 + uint64_t(t.border)) * t.row +
                            (t.w - 1 + uint64_t(t.border)) * t.pixel + uint64_t(padded(t.c))) *
                           size;
    if (arena == UNBOUNDED) return nullptr;
    if (t.offset < before) return "starts before the arena";
    return t.offset > arena || after > arena - t.offset ? "ends past the arena" : nullptr;
}

const char *check_weight(uint64_t offset, uint64_t bytes, uint64_t weights) {
    if (offset == FT_NO_WEIGHT) return nullptr;
    if (!bytes) return "does not belong to this kind";
    if (offset % 64) return "is not aligned";
    return offset > weights || bytes > weights - offset ? "ends past the weights" : nullptr;
}

struct Fault {
    const char *part = nullptr, *problem = nullptr;
};

Fault check_op(const ft_op &op, uint64_t arena, uint64_t weights) {
    const Op *kind = find_op(op.kind);
    if (!kind) return {"kind", "is unknown"};
    const Slots &slot = slots(op.kind);
    const struct {
        const char *name;
        const ft_tensor &tensor;
        Layout layout;
        bool needed;
    } tensors[] = {
        {"out", op.out, slot.out, true},           {"a", op.a, slot.a, true},
        {"b", op.b, slot.b, must_have_b(op.kind)}, {"c", op.c, slot.c, op.kind == FT_ATTENTION},
        {"add", op.add, slot.add, false},
    };
    for (const auto &t : tensors)
        if (const char *problem = check_tensor(t.tensor, t.layout, t.needed, arena))
            return {t.name, problem};
    if (op.band < 0 || op.band > 3) return {"band", "is not 0 to 3"};
    if (op.weight_type > FT_F16 && op.weight_type != FT_I8 && op.weight_type != FT_I4)
        return {"weight_type", "is unknown"};
    if (op.act > FT_TANH3) return {"act", "is unknown"};
    if (const char *problem = kind->check(op)) return {"op", problem};
    if (const char *problem = check_weight(op.weight, kind->weight_bytes(op), weights))
        return {"weight", problem};
    if (const char *problem = check_weight(op.bias, kind->bias_bytes(op), weights))
        return {"bias", problem};
    if (const char *problem = check_weight(op.scales, scale_bytes(op), weights))
        return {"scales", problem};
    return {};
}

Fault check_run(const ft_op &op, const Kernels &kernels, int threads, uint64_t arena) {
    const uint64_t bytes = find_op(op.kind)->scratch(op, kernels, threads);
    if (op.scratch % 64) return {"scratch", "is not aligned"};
    if (bytes && (op.scratch > arena || bytes > arena - op.scratch))
        return {"scratch", "ends past the arena"};
    if (op.kind == FT_MATMUL && !tile_of(op, kernels).run)
        return {"op", "has types that no kernel multiplies"};
    return {};
}

// For questions about a single op: everything but the bounds.
bool is_sound(const ft_op *op) { return op && !check_op(*op, UNBOUNDED, UNBOUNDED).problem; }

} // namespace
} // namespace ft

// --- the C interface ----------------------------------------------------------------------------

using namespace ft;

struct ft_program {
    std::vector<ft_op> ops;
    const Isa *isa;
    uint64_t weight_bytes;
    std::unique_ptr<Pool> pool;
    std::unique_ptr<Streamer> streamer; // null: the weights stay
};

uint32_t ft_abi(void) { return FT_ABI; }
uint32_t ft_op_bytes(void) { return sizeof(ft_op); }
const char *ft_isa_name(uint32_t i) { return i < uint32_t(isa_count) ? isas[i].name : nullptr; }
int ft_isa_supported(uint32_t i) {
    return i < uint32_t(isa_count) && find_isa(isas[i].name) != nullptr;
}

uint64_t ft_op_scratch(const ft_op *op, uint32_t threads, const char *isa) {
    const Isa *found = find_isa(isa);
    if (!found || !is_sound(op) || threads < 1 || threads > FT_MAX_THREADS) return UINT64_MAX;
    if (op->kind == FT_MATMUL && !tile_of(*op, *found->kernels).run) return UINT64_MAX;
    return round_up(find_op(op->kind)->scratch(*op, *found->kernels, int(threads)), 64);
}

int ft_op_winograd(const ft_op *op, const char *isa) {
    const Isa *found = find_isa(isa);
    return found && op->kind == FT_MATMUL && is_sound(op) && winograd_fits(*op, *found->kernels);
}

uint64_t ft_op_weight_bytes(const ft_op *op) {
    return is_sound(op) ? find_op(op->kind)->weight_bytes(*op) : UINT64_MAX;
}

ft_program *ft_program_create(const ft_op *ops, size_t count, size_t arena_bytes,
                              size_t weight_bytes, uint32_t threads, const char *isa, char *message,
                              size_t message_bytes) {
    const auto refuse = [&](const char *format, auto... values) -> ft_program * {
        if (message && message_bytes) snprintf(message, message_bytes, format, values...);
        return nullptr;
    };
    if (!ops || !count) return refuse("the program has no ops%s", "");
    if (threads < 1 || threads > FT_MAX_THREADS)
        return refuse("threads is %u: it must be 1 to %d", threads, FT_MAX_THREADS);
    const Isa *found = find_isa(isa);
    if (!found) return refuse("this build or machine does not run %s", isa ? isa : "anything");
    for (size_t i = 0; i < count; i++) {
        Fault fault = check_op(ops[i], arena_bytes, weight_bytes);
        if (!fault.problem) fault = check_run(ops[i], *found->kernels, int(threads), arena_bytes);
        if (fault.problem)
            return refuse("op %zu of %zu (kind %u): %s %s", i, count, ops[i].kind, fault.part,
                          fault.problem);
    }
    try {
        std::unique_ptr<ft_program> program(new ft_program);
        program->ops.assign(ops, ops + count);
        program->isa = found;
        program->weight_bytes = weight_bytes;
        program->pool.reset(new Pool(int(threads), found->enter));
        return program.release();
    } catch (const std::exception &error) { // out of memory, or of threads
        return refuse("cannot start: %s", error.what());
    }
}

void ft_program_free(ft_program *program) { delete program; }
const char *ft_program_isa(const ft_program *program) { return program->isa->name; }

size_t ft_program_run(ft_program *program, void *arena, const void *weights, uint64_t *nanoseconds,
                      const volatile int *cancel) {
    Streamer *const streamer = program->streamer.get();
    const Context context{static_cast<char *>(arena), static_cast<const char *>(weights),
                          program->isa->kernels, program->pool.get(), streamer};
    const Guard guard(weights, program->weight_bytes);
    if (program->isa->enter) program->isa->enter(); // the caller's thread works as well
    const size_t count = program->ops.size();
    const auto stop = [&](size_t done) {
        if (streamer) streamer->end();
        return done;
    };
    if (streamer) streamer->begin(weights, program->weight_bytes);
    for (size_t i = 0; i < count; i++) {
        // Another thread may write it meanwhile.
        const bool cancelled = cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED);
        if (cancelled || (streamer && !streamer->wait_for(i))) return stop(i);
        const auto start = std::chrono::steady_clock::now();
        find_op(program->ops[i].kind)->run(program->ops[i], context);
        if (nanoseconds)
            nanoseconds[i] = uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                          std::chrono::steady_clock::now() - start)
                                          .count());
        if (guard.broken()) return stop(i);
        if (streamer) streamer->finished(i);
    }
    return stop(count);
}

int ft_can_stream(void) { return can_stream(); }
int ft_guard_install(void) { return guard_install() ? 0 : -1; }

int ft_program_stream(ft_program *program, const ft_range *ranges, size_t count, uint64_t window,
                      char *message, size_t message_bytes) {
    const auto refuse = [&](const char *problem, size_t i) {
        if (message && message_bytes) snprintf(message, message_bytes, "range %zu %s", i, problem);
        return -1;
    };
    if (!can_stream()) return refuse("cannot be streamed on this system", 0);
    const size_t ops = program->ops.size();
    for (size_t i = 0; i < count; i++) {
        const ft_range &r = ranges[i];
        if (r.offset > program->weight_bytes || r.bytes > program->weight_bytes - r.offset)
            return refuse("ends past the weights", i);
        if (r.first > r.last || r.last >= ops) return refuse("has no such ops", i);
        if (i && r.first < ranges[i - 1].first) return refuse("is out of order", i);
    }
    try {
        std::vector<uint64_t> ending(ops + 1); // bytes that each op is the last to read
        uint64_t live = 0;
        for (size_t i = 0, op = 0; i < count; i++) {
            for (; op < ranges[i].first; op++) live -= ending[op];
            if (ranges[i].bytes > window || live > window - ranges[i].bytes)
                return refuse("and others that its first op reads exceed the window", i);
            live += ranges[i].bytes;
            ending[ranges[i].last] += ranges[i].bytes;
        }
        program->streamer.reset(new Streamer(ranges, count, window));
    } catch (const std::exception &) { // out of memory, or of threads
        return refuse("has no thread to bring it", 0);
    }
    return 0;
}

double ft_ceiling(const char *isa, uint32_t type, uint32_t threads, double seconds) {
    const Isa *found = find_isa(isa);
    if (!found || (type > FT_F16 && type != FT_I8) || threads < 1 || threads > FT_MAX_THREADS)
        return 0;
    const auto burn = found->kernels->burn;
    constexpr int64_t ROUNDS = 1 << 16;
    if (!burn || burn(type, 1) == 0) return 0;
    Pool pool(int(threads), found->enter);
    if (found->enter) found->enter();
    double best = 0;
    const auto now = [] { return std::chrono::steady_clock::now(); };
    for (const auto end = now() + std::chrono::duration<double>(seconds); now() < end;) {
        double flop[FT_MAX_THREADS] = {};
        const auto start = now();
        pool.each(threads, [&](int64_t i, int) {
            for (int round = 0; round < 16; round++) flop[i] += burn(type, ROUNDS);
        });
        double total = 0;
        for (uint32_t i = 0; i < threads; i++) total += flop[i];
        const double rate = total / std::chrono::duration<double>(now() - start).count();
        if (rate > best) best = rate;
    }
    return best;
}
