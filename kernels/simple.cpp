// Ops that move little data: one implementation for every instruction set, except unary and add.
#include <math.h>

#include "internal.h"
#include "simd_scalar.h"
#include "stream.h"

namespace ft {
namespace {

float activate(float x, uint32_t act) {
    switch (act) {
    case FT_SILU: return x / (1 + expf(-x));
    case FT_GELU: return 0.5f * x * (1 + erff(x * 0.70710678f));
    case FT_QUICK_GELU: return x / (1 + expf(-1.702f * x));
    case FT_RELU: return x < 0 ? 0 : x;
    case FT_TANH3: return 3 * tanhf(x / 3);
    default: return x;
    }
}

void fill_padding(char *pixel, const ft_tensor &t) {
    const int64_t bytes = type_bytes(t.type);
    memset(pixel + t.c * bytes, 0, (padded(t.c) - t.c) * bytes);
}

bool same_size(const ft_tensor &a, const ft_tensor &b) {
    return a.h == b.h && a.w == b.w && a.c == b.c;
}

uint64_t no_scratch(const ft_op &, const Kernels &, int) { return 0; }
uint64_t none(const ft_op &) { return 0; }

// --- embedding ----------------------------------------------------------------------------------

const char *check_embedding(const ft_op &op) {
    if (op.a.type != FT_I32 || op.a.c != 1) return "a does not hold ids";
    if (op.out.type > FT_F16 || op.out.h != 1 || op.a.h != 1 || op.out.w != op.a.w)
        return "out is not a row per id";
    if (op.size < 1) return "the table has no rows";
    if (op.weight == FT_NO_WEIGHT || op.bias == FT_NO_WEIGHT) return "no weight or bias";
    return nullptr;
}

uint64_t table_bytes(const ft_op &op) {
    return uint64_t(op.size) * padded(op.out.c) * sizeof(float);
}
uint64_t positions_bytes(const ft_op &op) {
    return uint64_t(op.out.w) * padded(op.out.c) * sizeof(float);
}

void run_embedding(const ft_op &op, const Context &context) {
    const int64_t channels = padded(op.out.c);
    zero_border(op, context);
    for (int64_t i = 0; i < op.out.w; i++) {
        int32_t id;
        memcpy(&id, context.at(op.a) + 4 * i, 4);
        // The ids are data, not program: one outside of the table reads its nearest row.
        id = id < 0 ? 0 : id >= op.size ? op.size - 1 : id;
        const uint64_t bytes = channels * sizeof(float);
        const uint64_t row_at = op.weight + id * bytes, position_at = op.bias + i * bytes;
        if (context.streamer) {
            context.streamer->touch_alone(row_at, bytes);
            context.streamer->touch_alone(position_at, bytes);
        }
        const float *row = reinterpret_cast<const float *>(context.weights + row_at);
        const float *position = reinterpret_cast<const float *>(context.weights + position_at);
        char *out = context.at(op.out, 0, i);
        for (int64_t c = 0; c < channels; c++)
            put(out, op.out.type, c, c < op.out.c ? row[c] + position[c] : 0);
    }
}

// --- sinusoids ----------------------------------------------------------------------------------

const char *check_sinusoid(const ft_op &op) {
    if (op.a.type != FT_F32 || op.a.c != 1 || op.a.h != 1) return "a does not hold numbers";
    if (op.out.type > FT_F16 || op.out.h != 1 || op.out.w != op.a.w) return "out is not a row each";
    if (op.out.c < 2 || op.out.c / 2 == op.x) return "too few channels";
    return nullptr;
}

// Vaswani et al. 2017, as diffusers' get_timestep_embedding; an odd last channel is zero.
void run_sinusoid(const ft_op &op, const Context &context) {
    const int64_t half = op.out.c / 2;
    zero_border(op, context);
    for (int64_t i = 0; i < op.out.w; i++) {
        const double t = get(context.at(op.a), FT_F32, i);
        char *out = context.at(op.out, 0, i);
        memset(out, 0, padded(op.out.c) * type_bytes(op.out.type));
        for (int64_t c = 0; c < half; c++) {
            const double angle = t * exp(-log(10000.0) * double(c) / (double(half) - op.x));
            put(out, op.out.type, c, float(op.flip ? sin(angle) : cos(angle)));
            put(out, op.out.type, half + c, float(op.flip ? cos(angle) : sin(angle)));
        }
    }
}

// --- unary and add ------------------------------------------------------------------------------

const char *check_unary(const ft_op &op) {
    if (op.a.type > FT_F16 || op.out.type > FT_F16) return "unknown type";
    if (!same_size(op.a, op.out)) return "out is not like a";
    if (op.act > FT_TANH3) return "unknown activation";
    return nullptr;
}

const char *check_add(const ft_op &op) {
    if (const char *wrong = check_unary(op)) return wrong;
    if (op.a.type != op.out.type || op.b.type != op.a.type) return "a, b and out differ in type";
    return same_size(op.a, op.b) ? nullptr : "b is not like a";
}

void run_unary(const ft_op &op, const Context &context) {
    const bool two = op.kind == FT_ADD;
    const int64_t channels = padded(op.out.c);
    zero_border(op, context);
    const int64_t across = (op.out.w + 63) / 64;
    context.pool->each(op.out.h * across, [&](int64_t job, int) {
        const int64_t y = job / across, first = job % across * 64;
        for (int64_t x = first; x < op.out.w && x < first + 64; x++) {
            char *out = context.at(op.out, y, x);
            const char *a = context.at(op.a, y, x);
            if (op.a.type == op.out.type)
                context.kernels->unary(out, a, two ? context.at(op.b, y, x) : nullptr, op.out.type,
                                       int(channels), op.act);
            else
                for (int64_t c = 0; c < channels; c++)
                    put(out, op.out.type, c, activate(get(a, op.a.type, c), op.act));
        }
    });
}

// --- in and out ---------------------------------------------------------------------------------

const char *check_load(const ft_op &op) {
    if (op.a.type != FT_F32 || op.out.type > FT_F16) return "unknown type";
    if (op.act > FT_TANH3) return "unknown activation";
    return same_size(op.a, op.out) ? nullptr : "out is not like a";
}

void run_load(const ft_op &op, const Context &context) {
    const int64_t plane = op.a.pixel;
    zero_border(op, context);
    context.pool->each(op.out.h, [&](int64_t y, int) {
        for (int64_t x = 0; x < op.out.w; x++) {
            char *out = context.at(op.out, y, x);
            for (int64_t c = 0; c < op.out.c; c++) {
                const float value = get(context.at(op.a), FT_F32, c * plane + y * op.a.w + x);
                put(out, op.out.type, c, activate(value, op.act) * op.x);
            }
            fill_padding(out, op.out);
        }
    });
}

const char *check_store(const ft_op &op) {
    if (op.out.type != FT_F32 || op.a.type > FT_F16) return "unknown type";
    return same_size(op.a, op.out) ? nullptr : "out is not like a";
}

void run_store(const ft_op &op, const Context &context) {
    const int64_t plane = op.out.pixel;
    context.pool->each(op.a.h, [&](int64_t y, int) {
        for (int64_t x = 0; x < op.a.w; x++) {
            const char *a = context.at(op.a, y, x);
            for (int64_t c = 0; c < op.a.c; c++)
                put(context.at(op.out), FT_F32, c * plane + y * op.a.w + x,
                    get(a, op.a.type, c) * op.x + op.y);
        }
    });
}

const char *check_bytes(const ft_op &op) {
    if (op.out.type != FT_U8 || op.a.type > FT_F16) return "unknown type";
    return same_size(op.a, op.out) ? nullptr : "out is not like a";
}

void run_bytes(const ft_op &op, const Context &context) {
    context.pool->each(op.a.h, [&](int64_t y, int) {
        uint8_t *out = reinterpret_cast<uint8_t *>(context.at(op.out)) + y * op.a.w * op.a.c;
        for (int64_t x = 0; x < op.a.w; x++)
            for (int64_t c = 0; c < op.a.c; c++) {
                const float v = get(context.at(op.a, y, x), op.a.type, c) * op.x + op.y;
                *out++ = uint8_t(nearbyintf((v > 0 ? v < 1 ? v : 1 : 0) * 255)); // NaN is black
            }
    });
}

// --- pick ---------------------------------------------------------------------------------------

const char *check_pick(const ft_op &op) {
    if (op.b.type != FT_I32 || op.b.c != 1 || op.b.h != 1) return "b does not hold ids";
    if (op.a.h != 1 || op.a.w != op.b.w) return "b is not an id per row of a";
    if (op.a.type > FT_F16 || op.out.type != op.a.type) return "a and out are not of one type";
    if (op.out.h != 1 || op.out.w != 1 || op.out.c != op.a.c) return "out is not a row of a";
    return nullptr;
}

void run_pick(const ft_op &op, const Context &context) {
    int64_t found = -1, largest = 0;
    int32_t top = 0;
    for (int64_t i = 0; i < op.b.w; i++) {
        int32_t id;
        memcpy(&id, context.at(op.b) + 4 * i, 4);
        if (found < 0 && id == op.size) found = i;
        if (i == 0 || id > top) top = id, largest = i;
    }
    const int64_t i = op.size < 0 ? largest : found < 0 ? 0 : found;
    zero_border(op, context);
    memmove(context.at(op.out), context.at(op.a, 0, i), padded(op.a.c) * type_bytes(op.a.type));
}

} // namespace

const Op embedding_op = {check_embedding, no_scratch, table_bytes, positions_bytes, run_embedding};
const Op sinusoid_op = {check_sinusoid, no_scratch, none, none, run_sinusoid};
const Op unary_op = {check_unary, no_scratch, none, none, run_unary};
const Op add_op = {check_add, no_scratch, none, none, run_unary};
const Op load_op = {check_load, no_scratch, none, none, run_load};
const Op store_op = {check_store, no_scratch, none, none, run_store};
const Op bytes_op = {check_bytes, no_scratch, none, none, run_bytes};
const Op pick_op = {check_pick, no_scratch, none, none, run_pick};

} // namespace ft
