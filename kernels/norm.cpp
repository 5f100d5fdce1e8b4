// Group norm over one tensor or two side by side, whole or band by band, and layer norm.
//
// Sums are taken of differences from a channel's first value, in fp32 over few pixels and in fp64
// over the rest, so that a large mean does not eat the variance.  Rows are added up apart and then
// in their order: neither the number of threads nor that of bands shows in a sum.
#include <math.h>

#include "internal.h"
#include "simd_scalar.h"

namespace ft {
namespace {

constexpr int64_t FEW_PIXELS = 64; // that fp32 adds up
constexpr int64_t BATCH_ROWS = 64; // whose sums wait to be added in their order
constexpr int64_t APPLY_PIXELS = 64;

int64_t pixels_of(const ft_tensor &t) { return int64_t(t.h) * t.w; }

// Call f(y, x, count, done) for each piece of a row in [first, last) of an image's pixels.
template <class F> void rows_between(const ft_tensor &t, int64_t first, int64_t last, const F &f) {
    for (int64_t p = first; p < last;) {
        const int64_t x = p % t.w, count = t.w - x < last - p ? t.w - x : last - p;
        f(p / t.w, x, count);
        p += count;
    }
}

int64_t channels_of(const ft_op &op) { return padded(op.a.c) + (op.b.h ? padded(op.b.c) : 0); }

// --- sums ---------------------------------------------------------------------------------------

struct Sums { // of all rows so far, by channel
    int64_t channels;
    double *total; // sums of differences from shift, then those of their squares
    float *shift;

    Sums(int64_t n, char *at)
        : channels(n), total(reinterpret_cast<double *>(at)),
          shift(reinterpret_cast<float *>(total + 2 * n)) {}
    static int64_t bytes(int64_t n) { return 2 * n * sizeof(double) + n * sizeof(float); }
};

// Scratch while rows are added: sums of a batch of rows, and of few pixels by thread.
int64_t adding_bytes(const ft_op &op, int threads) {
    const int64_t rows = op.a.h < BATCH_ROWS ? op.a.h : BATCH_ROWS, n = channels_of(op);
    return rows * 2 * n * sizeof(double) + threads * 2 * n * sizeof(float);
}

void start_sums(const ft_op &op, const Context &context, const ft_tensor &second,
                const Sums &sums) {
    memset(sums.total, 0, 2 * sums.channels * sizeof(double));
    float *shift = sums.shift;
    const ft_tensor *sources[] = {&op.a, &second};
    for (const ft_tensor *t : sources) {
        if (!t->h) continue;
        for (int64_t c = 0; c < padded(t->c); c++) *shift++ = get(context.at(*t), t->type, c);
    }
}

void add_row(const Context &context, const ft_tensor *const sources[2], int64_t y, const Sums &sums,
             double *row, float *few) {
    const int64_t n = sums.channels, width = sources[0]->w;
    memset(row, 0, 2 * n * sizeof(double));
    for (int64_t x = 0; x < width; x += FEW_PIXELS) {
        const int64_t count = width - x < FEW_PIXELS ? width - x : FEW_PIXELS;
        memset(few, 0, 2 * n * sizeof(float));
        int64_t channel = 0;
        for (int i = 0; i < 2 && sources[i]->h; i++) {
            const ft_tensor &t = *sources[i];
            context.kernels->moments(context.at(t, y, x), t.type, bytes_of_pixel(t), int(count),
                                     int(padded(t.c)), sums.shift + channel, few + channel,
                                     few + n + channel);
            channel += padded(t.c);
        }
        for (int64_t c = 0; c < 2 * n; c++) row[c] += few[c];
    }
}

void add_rows(const ft_op &op, const Context &context, const ft_tensor &second, const Sums &sums,
              char *scratch) {
    const int64_t n = sums.channels, h = op.a.h;
    const int64_t batch = h < BATCH_ROWS ? h : BATCH_ROWS;
    double *rows = reinterpret_cast<double *>(scratch);
    float *few = reinterpret_cast<float *>(rows + batch * 2 * n);
    const ft_tensor *const sources[] = {&op.a, &second};
    for (int64_t first = 0; first < h; first += batch) {
        const int64_t count = h - first < batch ? h - first : batch;
        context.pool->each(count, [&](int64_t i, int thread) {
            add_row(context, sources, first + i, sums, rows + i * 2 * n, few + thread * 2 * n);
        });
        for (int64_t i = 0; i < count; i++)
            for (int64_t c = 0; c < 2 * n; c++) sums.total[c] += rows[i * 2 * n + c];
    }
}

// --- applied ------------------------------------------------------------------------------------

struct Affine { // by channel
    float *scale, *offset;

    Affine(int64_t n, char *at) : scale(reinterpret_cast<float *>(at)), offset(scale + n) {}
    static int64_t bytes(int64_t n) { return 2 * n * sizeof(float); }
};

void combine(const ft_op &op, const Context &context, const Sums &sums, double pixels,
             const Affine &affine) {
    const float *gamma = reinterpret_cast<const float *>(context.weights + op.weight);
    const float *beta = reinterpret_cast<const float *>(context.weights + op.bias);
    const int64_t n = sums.channels, per_group = op.out.c / op.groups;
    memset(affine.scale, 0, Affine::bytes(n)); // padding stays zero
    for (int64_t first = 0; first < op.out.c; first += per_group) {
        double mean = 0, squares = 0;
        for (int64_t c = first; c < first + per_group; c++)
            mean += (sums.shift[c] + sums.total[c] / pixels) / double(per_group);
        for (int64_t c = first; c < first + per_group; c++) {
            const double from_shift = sums.total[c] / pixels;
            const double from_mean = sums.shift[c] + from_shift - mean;
            squares += sums.total[n + c] - pixels * from_shift * from_shift +
                       pixels * from_mean * from_mean;
        }
        const double variance = squares / (pixels * double(per_group));
        const double factor = 1 / sqrt((variance > 0           ? variance
                                        : variance != variance ? variance
                                                               : 0) +
                                       op.x);
        for (int64_t c = first; c < first + per_group; c++) {
            affine.scale[c] = float(gamma[c] * factor);
            affine.offset[c] = float(beta[c] - gamma[c] * factor * mean);
        }
    }
}

void apply(const ft_op &op, const Context &context, const ft_tensor &second, const Affine &affine) {
    const Kernels &kernels = *context.kernels;
    const int64_t pixels = pixels_of(op.a), a_channels = padded(op.a.c);
    const int64_t b_out = a_channels * type_bytes(op.out.type);
    context.pool->each((pixels + APPLY_PIXELS - 1) / APPLY_PIXELS, [&](int64_t job, int) {
        const int64_t first = job * APPLY_PIXELS;
        const int64_t last = first + APPLY_PIXELS < pixels ? first + APPLY_PIXELS : pixels;
        rows_between(op.a, first, last, [&](int64_t y, int64_t x0, int64_t count) {
            for (int64_t x = x0; x < x0 + count; x++) {
                char *out = context.at(op.out, y, x);
                kernels.affine(out, context.at(op.a, y, x), op.a.type, int(a_channels),
                               affine.scale, affine.offset, op.act);
                if (second.h)
                    kernels.affine(out + b_out, context.at(second, y, x), second.type,
                                   int(padded(second.c)), affine.scale + a_channels,
                                   affine.offset + a_channels, op.act);
            }
        });
    });
}

// --- the whole norm -----------------------------------------------------------------------------

const char *check_normed(const ft_op &op) { // what the whole one and a band's have in common
    if (op.groups < 1 || op.out.c % op.groups) return "channels do not fall into groups";
    if (op.act > FT_RELU) return "unknown activation";
    if (op.weight == FT_NO_WEIGHT || op.bias == FT_NO_WEIGHT) return "no weight or bias";
    return nullptr;
}

const char *check_group_norm(const ft_op &op) {
    const ft_tensor &a = op.a, &b = op.b, &out = op.out;
    if (a.type > FT_F16 || out.type != a.type) return "a and out are not of one type";
    if (b.h && (b.h != a.h || b.w != a.w || b.type != a.type || a.c % LANES))
        return "b is not beside a";
    if (out.h != a.h || out.w != a.w || out.c != a.c + (b.h ? b.c : 0)) return "out is not like a";
    return check_normed(op);
}

uint64_t scratch_group_norm(const ft_op &op, const Kernels &, int threads) {
    const int64_t n = channels_of(op);
    return round_up(Sums::bytes(n), 64) + round_up(Affine::bytes(n), 64) +
           adding_bytes(op, threads);
}

uint64_t channel_bytes(const ft_op &op) { return padded(op.out.c) * sizeof(float); }

void run_group_norm(const ft_op &op, const Context &context) {
    const int64_t n = channels_of(op);
    char *at = context.arena + op.scratch;
    const Sums sums(n, at);
    const Affine affine(n, at += round_up(Sums::bytes(n), 64));
    start_sums(op, context, op.b, sums);
    add_rows(op, context, op.b, sums, at + round_up(Affine::bytes(n), 64));
    combine(op, context, sums, double(pixels_of(op.a)), affine);
    zero_border(op, context);
    apply(op, context, op.b, affine);
}

// --- band by band -------------------------------------------------------------------------------

constexpr ft_tensor ABSENT = {};

const char *check_sums(const ft_tensor &sums, int64_t channels) {
    if (sums.type != FT_F32 || sums.h != 1 || sums.w != 1 ||
        sums.c * sizeof(float) != uint64_t(Sums::bytes(channels)))
        return "the sums do not fit the channels";
    return sums.offset % sizeof(double) ? "the sums are not aligned" : nullptr;
}

const char *check_moments(const ft_op &op) {
    if (op.a.type > FT_F16) return "unknown type";
    if (op.size < 0) return "size is negative";
    if (op.act) return "moments have no activation";
    return check_sums(op.out, padded(op.a.c));
}

uint64_t scratch_moments(const ft_op &op, const Kernels &, int threads) {
    return adding_bytes(op, threads);
}

void run_moments(const ft_op &op, const Context &context) {
    const Sums sums(padded(op.a.c), context.at(op.out));
    if (!op.size) start_sums(op, context, ABSENT, sums);
    add_rows(op, context, ABSENT, sums, context.arena + op.scratch);
}

const char *check_affine(const ft_op &op) {
    const ft_tensor &a = op.a, &out = op.out;
    if (a.type > FT_F16 || out.type != a.type) return "a and out are not of one type";
    if (out.h != a.h || out.w != a.w || out.c != a.c) return "out is not like a";
    if (op.size < 1) return "size is not the pixels of the image";
    if (const char *wrong = check_sums(op.b, padded(a.c))) return wrong;
    return check_normed(op);
}

uint64_t scratch_affine(const ft_op &op, const Kernels &, int) {
    return Affine::bytes(padded(op.out.c));
}

void run_affine(const ft_op &op, const Context &context) {
    const Affine affine(padded(op.out.c), context.arena + op.scratch);
    combine(op, context, Sums(padded(op.a.c), context.at(op.b)), op.size, affine);
    zero_border(op, context);
    apply(op, context, ABSENT, affine);
}

// --- layer norm ---------------------------------------------------------------------------------

const char *check_layer_norm(const ft_op &op) {
    if (op.a.type > FT_F16 || op.out.type != op.a.type) return "a and out are not of one type";
    if (op.out.h != op.a.h || op.out.w != op.a.w || op.out.c != op.a.c) return "out is not like a";
    if (op.act) return "layer norm has no activation";
    if (op.weight == FT_NO_WEIGHT || op.bias == FT_NO_WEIGHT) return "no weight or bias";
    return nullptr;
}

uint64_t no_scratch(const ft_op &, const Kernels &, int) { return 0; }
uint64_t none(const ft_op &) { return 0; }

void run_layer_norm(const ft_op &op, const Context &context) {
    const float *gamma = reinterpret_cast<const float *>(context.weights + op.weight);
    const float *beta = reinterpret_cast<const float *>(context.weights + op.bias);
    const int64_t pixels = pixels_of(op.a);
    zero_border(op, context);
    context.pool->each((pixels + APPLY_PIXELS - 1) / APPLY_PIXELS, [&](int64_t job, int) {
        const int64_t first = job * APPLY_PIXELS;
        const int64_t last = first + APPLY_PIXELS < pixels ? first + APPLY_PIXELS : pixels;
        rows_between(op.a, first, last, [&](int64_t y, int64_t x0, int64_t count) {
            for (int64_t x = x0; x < x0 + count; x++)
                context.kernels->layer_norm(context.at(op.out, y, x), context.at(op.a, y, x),
                                            op.a.type, int(op.a.c), op.x, gamma, beta);
        });
    });
}

} // namespace

const Op group_norm_op = {check_group_norm, scratch_group_norm, channel_bytes, channel_bytes,
                          run_group_norm};
const Op moments_op = {check_moments, scratch_moments, none, none, run_moments};
const Op affine_op = {check_affine, scratch_affine, channel_bytes, channel_bytes, run_affine};
const Op layer_norm_op = {check_layer_norm, no_scratch, channel_bytes, channel_bytes,
                          run_layer_norm};

} // namespace ft
