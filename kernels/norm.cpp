// Group norm over one tensor or two side by side, and layer norm.
//
// Sums are taken of differences from a channel's first value, in fp32 over few pixels and in fp64
// over the rest, so that a large mean does not eat the variance.
#include <math.h>

#include "internal.h"
#include "simd_scalar.h"

namespace ft {
namespace {

constexpr int64_t JOB_PIXELS = 64; // at least; and at most as many jobs: the sums do not depend
constexpr int64_t MAX_JOBS = 64;   // on the number of threads
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

struct Shares { // of the scratch of a group norm
    int64_t channels, jobs;
    float *shift, *scale, *offset; // by channel
    double *sums;                  // by job: sum and sum of squares by channel
    float *thread;                 // by thread: the same over few pixels

    Shares(const ft_op &op, char *scratch) {
        channels = padded(op.out.c);
        const int64_t pixels = pixels_of(op.a);
        jobs = (pixels + JOB_PIXELS - 1) / JOB_PIXELS;
        if (jobs > MAX_JOBS) jobs = MAX_JOBS;
        sums = reinterpret_cast<double *>(scratch);
        shift = reinterpret_cast<float *>(sums + 2 * jobs * channels);
        scale = shift + channels;
        offset = scale + channels;
        thread = offset + channels;
    }
    int64_t bytes(int threads) const {
        return 2 * jobs * channels * sizeof(double) + (3 + 2 * threads) * channels * sizeof(float);
    }
};

const char *check_group_norm(const ft_op &op) {
    const ft_tensor &a = op.a, &b = op.b, &out = op.out;
    if (a.type > FT_F16 || out.type != a.type) return "a and out are not of one type";
    if (b.h && (b.h != a.h || b.w != a.w || b.type != a.type || a.c % LANES))
        return "b is not beside a";
    if (out.h != a.h || out.w != a.w || out.c != a.c + (b.h ? b.c : 0)) return "out is not like a";
    if (op.groups < 1 || out.c % op.groups) return "channels do not fall into groups";
    if (op.act > FT_RELU) return "unknown activation";
    if (op.weight == FT_NO_WEIGHT || op.bias == FT_NO_WEIGHT) return "no weight or bias";
    return nullptr;
}

uint64_t scratch_group_norm(const ft_op &op, const Kernels &, int threads) {
    return Shares(op, nullptr).bytes(threads);
}

uint64_t channel_bytes(const ft_op &op) { return padded(op.out.c) * sizeof(float); }

void read_first_pixel(const ft_op &op, const Context &context, float *shift) {
    const ft_tensor *sources[] = {&op.a, &op.b};
    for (const ft_tensor *t : sources) {
        if (!t->h) continue;
        for (int64_t c = 0; c < padded(t->c); c++) *shift++ = get(context.at(*t), t->type, c);
    }
}

// Sums of a job's pixels, added up in fp64 every JOB_PIXELS.
void moments(const ft_op &op, const Context &context, const Shares &shares, int64_t job,
             int thread) {
    const int64_t pixels = pixels_of(op.a), n = shares.channels;
    const int64_t first = pixels * job / shares.jobs, last = pixels * (job + 1) / shares.jobs;
    double *sums = shares.sums + 2 * n * job;
    float *few = shares.thread + 2 * n * thread;
    memset(sums, 0, 2 * n * sizeof(double));
    for (int64_t start = first; start < last; start += JOB_PIXELS) {
        const int64_t end = start + JOB_PIXELS < last ? start + JOB_PIXELS : last;
        memset(few, 0, 2 * n * sizeof(float));
        int64_t channel = 0;
        const ft_tensor *sources[] = {&op.a, &op.b};
        for (const ft_tensor *t : sources) {
            if (!t->h) continue;
            rows_between(*t, start, end, [&](int64_t y, int64_t x, int64_t count) {
                context.kernels->moments(context.at(*t, y, x), t->type, bytes_of_pixel(*t),
                                         int(count), int(padded(t->c)), shares.shift + channel,
                                         few + channel, few + n + channel);
            });
            channel += padded(t->c);
        }
        for (int64_t c = 0; c < 2 * n; c++) sums[c] += few[c];
    }
}

// Sums by job and channel to scale and offset by channel.
void combine(const ft_op &op, const Context &context, const Shares &shares) {
    const float *gamma = reinterpret_cast<const float *>(context.weights + op.weight);
    const float *beta = reinterpret_cast<const float *>(context.weights + op.bias);
    const int64_t n = shares.channels, per_group = op.out.c / op.groups;
    const double pixels = double(pixels_of(op.a));
    for (int64_t j = 1; j < shares.jobs; j++)
        for (int64_t c = 0; c < 2 * n; c++) shares.sums[c] += shares.sums[2 * n * j + c];
    memset(shares.scale, 0, 2 * n * sizeof(float)); // scale and offset: padding stays zero
    for (int64_t first = 0; first < op.out.c; first += per_group) {
        double mean = 0, squares = 0;
        for (int64_t c = first; c < first + per_group; c++)
            mean += (shares.shift[c] + shares.sums[c] / pixels) / double(per_group);
        for (int64_t c = first; c < first + per_group; c++) {
            const double from_shift = shares.sums[c] / pixels;
            const double from_mean = shares.shift[c] + from_shift - mean;
            squares += shares.sums[n + c] - pixels * from_shift * from_shift +
                       pixels * from_mean * from_mean;
        }
        const double variance = squares / (pixels * double(per_group));
        const double factor = 1 / sqrt((variance > 0           ? variance
                                        : variance != variance ? variance
                                                               : 0) +
                                       op.x);
        for (int64_t c = first; c < first + per_group; c++) {
            shares.scale[c] = float(gamma[c] * factor);
            shares.offset[c] = float(beta[c] - gamma[c] * factor * mean);
        }
    }
}

void run_group_norm(const ft_op &op, const Context &context) {
    const Shares shares(op, context.arena + op.scratch);
    const Kernels &kernels = *context.kernels;
    read_first_pixel(op, context, shares.shift);
    context.pool->each(shares.jobs,
                       [&](int64_t job, int thread) { moments(op, context, shares, job, thread); });
    combine(op, context, shares);
    if (op.out.border) zero_border(op.out, context);
    const int64_t pixels = pixels_of(op.a), a_channels = padded(op.a.c);
    const int64_t b_out = a_channels * type_bytes(op.out.type);
    context.pool->each((pixels + APPLY_PIXELS - 1) / APPLY_PIXELS, [&](int64_t job, int) {
        const int64_t first = job * APPLY_PIXELS;
        const int64_t last = first + APPLY_PIXELS < pixels ? first + APPLY_PIXELS : pixels;
        rows_between(op.a, first, last, [&](int64_t y, int64_t x0, int64_t count) {
            for (int64_t x = x0; x < x0 + count; x++) {
                char *out = context.at(op.out, y, x);
                kernels.affine(out, context.at(op.a, y, x), op.a.type, int(a_channels),
                               shares.scale, shares.offset, op.act);
                if (op.b.h)
                    kernels.affine(out + b_out, context.at(op.b, y, x), op.b.type,
                                   int(padded(op.b.c)), shares.scale + a_channels,
                                   shares.offset + a_channels, op.act);
            }
        });
    });
}

const char *check_layer_norm(const ft_op &op) {
    if (op.a.type > FT_F16 || op.out.type != op.a.type) return "a and out are not of one type";
    if (op.out.h != op.a.h || op.out.w != op.a.w || op.out.c != op.a.c) return "out is not like a";
    if (op.act) return "layer norm has no activation";
    if (op.weight == FT_NO_WEIGHT || op.bias == FT_NO_WEIGHT) return "no weight or bias";
    return nullptr;
}

uint64_t no_scratch(const ft_op &, const Kernels &, int) { return 0; }

void run_layer_norm(const ft_op &op, const Context &context) {
    const float *gamma = reinterpret_cast<const float *>(context.weights + op.weight);
    const float *beta = reinterpret_cast<const float *>(context.weights + op.bias);
    const int64_t pixels = pixels_of(op.a);
    if (op.out.border) zero_border(op.out, context);
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
const Op layer_norm_op = {check_layer_norm, no_scratch, channel_bytes, channel_bytes,
                          run_layer_norm};

} // namespace ft
