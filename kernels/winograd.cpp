// 3x3 convolution with 16 products where the direct form has 36: Winograd's F(2x2, 3x3).
//
// Lavin & Gray 2016.  Pixels are transformed once per band of tile rows, weights once per panel of
// outputs and job, so that neither is ever stored in a larger form than the file's.  For each of
// the 16 positions a tile is one pixel of a matrix product, on the same kernels as everything else.
//
// Of int8 by int8 the transformed pixels become int8, each with a scale of its own, and transformed
// weights are rounded to int8 once more.
#include "internal.h"

namespace ft {
namespace {

constexpr int POSITIONS = 16;
constexpr int64_t BAND_BYTES = 8 << 20; // of transformed pixels: in the last-level cache
constexpr int64_t GROUP = 48;           // tiles whose sums wait for their output transform
// The 16 positions lie so far apart that they do not fall into the same few lines of a cache.
constexpr int64_t SKEW = 64;
constexpr int64_t SUM_POSITION = GROUP * TILE + SKEW / int64_t(sizeof(float)); // floats
constexpr int64_t JOB_GROUPS = 5; // at most: what a panel's transformed weights serve
constexpr int64_t LEAST_TILES = 64, LEAST_CHANNELS = 64; // below, transforms cost what they save

struct Plan {
    int64_t channels, element; // padded; bytes, as they are transformed
    int64_t across, down;      // tiles
    int64_t band_rows, bands;  // of tiles
    int64_t blocks, panels;
    bool few_bits; // weights become of the activations' type before they are transformed
    bool narrow;   // transformed pixels and weights become int8

    int64_t multiplied() const { return narrow ? 1 : element; } // bytes
    int64_t head() const { return narrow ? int64_t(sizeof(Int8Pixel)) : 0; }
    int64_t tile() const { return head() + channels * multiplied(); }
    int64_t position() const { return GROUP * tile() + SKEW; } // of pixels, in bytes
    int64_t group() const { return POSITIONS * position(); }
    int64_t pixel_bytes() const { return (band_rows * across + GROUP - 1) / GROUP * group(); }
    int64_t block() const { return channels * LANES * multiplied(); }
    int64_t weight_position() const { return MAX_BLOCKS * block() + SKEW; }
    int64_t weight_bytes() const { return POSITIONS * weight_position(); }
    int64_t widened() const { return few_bits ? 9 * block() : 0; } // nine taps of a block
    int64_t wide_position() const { return channels * element + SKEW; }
    int64_t wide_tile() const { return narrow ? POSITIONS * wide_position() : 0; } // before int8
    int64_t thread() const {
        return weight_bytes() + widened() + wide_tile() +
               (POSITIONS * SUM_POSITION + 5 * TILE) * int64_t(sizeof(float));
    }
};

Plan make_plan(const ft_op &op) {
    Plan plan;
    plan.channels = padded(op.a.c);
    plan.element = type_bytes(op.a.type);
    plan.across = op.out.w / 2;
    plan.down = op.out.h / 2;
    plan.narrow = op.narrow;
    const int64_t row = POSITIONS * plan.across * plan.tile();
    const int64_t rows = BAND_BYTES / row > 1 ? BAND_BYTES / row : 1;
    plan.bands = (plan.down + rows - 1) / rows;
    plan.band_rows = (plan.down + plan.bands - 1) / plan.bands; // as even as they go
    plan.blocks = padded(op.out.c) / LANES;
    plan.panels = (plan.blocks + MAX_BLOCKS - 1) / MAX_BLOCKS;
    plan.few_bits = widens(op);
    return plan;
}

struct Run {
    const ft_op &op;
    const Context &context;
    const Plan plan;
    const TileKernel kernel;

    char *pixels() const { return context.arena + op.scratch; }
    char *weights(int thread) const {
        return pixels() + plan.pixel_bytes() + thread * plan.thread();
    }
    char *wide_tile(int thread) const {
        return weights(thread) + plan.weight_bytes() + plan.widened();
    }
    // Sums, then those of 2x2 pixels, then scales of a panel's outputs.
    float *sums(int thread) const {
        return reinterpret_cast<float *>(wide_tile(thread) + plan.wide_tile());
    }
    float *scales(int thread) const { return sums(thread) + POSITIONS * SUM_POSITION + 4 * TILE; }

    void transform_pixels(int64_t band_row, int64_t y, int thread) const { // a row of tiles
        for (int64_t x = 0; x < plan.across; x++) {
            const int64_t t = y * plan.across + x; // of the band
            char *const v = pixels() + t / GROUP * plan.group() + t % GROUP * plan.tile();
            char *const wide = plan.narrow ? wide_tile(thread) : v;
            const int64_t step = plan.narrow ? plan.wide_position() : plan.position();
            context.kernels->winograd.input(
                wide, step, context.at(op.a, 2 * (band_row + y) - 1, 2 * x - 1), bytes_of_row(op.a),
                bytes_of_pixel(op.a), op.a.type, int(plan.channels));
            for (int p = 0; p < POSITIONS && plan.narrow; p++)
                context.kernels->to_int8(v + p * plan.position(), wide + p * step, op.a.type,
                                         int(plan.channels));
        }
    }

    int blocks_of(int64_t panel) const {
        const int64_t left = plan.blocks - panel * MAX_BLOCKS;
        return int(left < MAX_BLOCKS ? left : MAX_BLOCKS);
    }

    void transform_weights_int8(int64_t panel, char *u, float *scale) const {
        const int64_t tap = packed_bytes(op.weight_type, plan.channels);
        const int64_t first = panel * MAX_BLOCKS;
        const float *const own =
            reinterpret_cast<const float *>(context.weights + op.scales) + first * LANES;
        for (int b = 0; b < blocks_of(panel); b++)
            context.kernels->winograd.weights_int8(
                u + b * plan.block(), plan.weight_position(), scale + b * LANES,
                context.weights + op.weight + (first + b) * 9 * tap, tap, plan.channels);
        for (int n = 0; n < blocks_of(panel) * LANES; n++) scale[n] *= own[n];
    }

    void transform_weights(int64_t panel, char *u) const {
        const int64_t packed = packed_bytes(op.weight_type, plan.channels);
        const uint32_t type = plan.few_bits ? op.a.type : op.weight_type;
        const int64_t tap = plan.few_bits ? plan.block() : packed;
        const char *w = context.weights + op.weight + panel * MAX_BLOCKS * 9 * packed;
        char *const room = u + plan.weight_bytes();
        for (int b = 0; b < blocks_of(panel); b++, w += 9 * packed) {
            for (int i = 0; i < 9 && plan.few_bits; i++)
                context.kernels->widen(room + i * tap, type, w + i * packed, op.weight_type,
                                       plan.channels);
            context.kernels->winograd.weights(u + b * plan.block(), plan.weight_position(),
                                              op.a.type, plan.few_bits ? room : w, tap, type,
                                              plan.channels * LANES);
        }
    }

    // Sums at one position of the first `count` tiles from `v`.
    void products(const char *v, int64_t count, int blocks, const char *u, float *m) const {
        const int64_t tap = 0, tile = plan.tile();
        for (int b = 0; b < blocks; b += kernel.blocks)
            for (int64_t t = 0; t < count; t += kernel.rows) {
                const char *row[MAX_ROWS];
                const int rows = int(count - t < kernel.rows ? count - t : kernel.rows);
                for (int r = 0; r < rows; r++) row[r] = v + (t + r) * tile + plan.head();
                const char *next = v + (t + rows) * tile; // on its way while these are multiplied
                for (int64_t line = 0; line < rows * tile; line += 64)
                    __builtin_prefetch(next + line, 0, 2);
                kernel.run({row, &tap, 1, int32_t(plan.channels), u + b * plan.block(),
                            plan.block(), rows,
                            blocks - b < kernel.blocks ? blocks - b : kernel.blocks, 0, TILE,
                            m + t * TILE + b * LANES});
            }
    }

    // A panel of outputs of some groups of a band's tiles.
    void job(int64_t band_row, int64_t first, int64_t last, int64_t tiles, int64_t panel,
             int thread) const {
        const int blocks = blocks_of(panel);
        char *u = weights(thread);
        float *m = sums(thread), *out = m + POSITIONS * SUM_POSITION;
        float *const scale = plan.narrow ? scales(thread) : nullptr;
        plan.narrow ? transform_weights_int8(panel, u, scale) : transform_weights(panel, u);
        for (int64_t g = first; g < last; g++) {
            const int64_t start = g * GROUP;
            const int64_t count = tiles - start < GROUP ? tiles - start : GROUP;
            for (int p = 0; p < POSITIONS; p++)
                products(pixels() + g * plan.group() + p * plan.position(), count, blocks,
                         u + p * plan.weight_position(), m + p * SUM_POSITION);
            for (int64_t t = 0; t < count; t++) {
                const int64_t y = 2 * (band_row + (start + t) / plan.across);
                const int64_t x = 2 * ((start + t) % plan.across);
                context.kernels->winograd.output(out, m + t * TILE, SUM_POSITION, blocks * LANES);
                const int64_t ys[] = {y, y, y + 1, y + 1}, xs[] = {x, x + 1, x, x + 1};
                finish_pixels(op, context, out, 0, panel * MAX_BLOCKS, blocks, 4, ys, xs, scale);
            }
        }
    }

    void band(int64_t band_row) const {
        const int64_t rows =
            plan.down - band_row < plan.band_rows ? plan.down - band_row : plan.band_rows;
        const int64_t tiles = rows * plan.across;
        context.pool->each(rows,
                           [&](int64_t y, int thread) { transform_pixels(band_row, y, thread); });
        const int64_t groups = (tiles + GROUP - 1) / GROUP;
        int64_t chunks = (groups + JOB_GROUPS - 1) / JOB_GROUPS;
        while (plan.panels * chunks < 4 * context.pool->threads() && 2 * chunks <= groups)
            chunks *= 2; // few panels: work for every thread all the same
        context.pool->each(plan.panels * chunks, [&](int64_t i, int thread) {
            const int64_t chunk = i % chunks;
            job(band_row, groups * chunk / chunks, groups * (chunk + 1) / chunks, tiles, i / chunks,
                thread);
        });
    }
};

} // namespace

bool winograd_fits(const ft_op &op, const Kernels &kernels) {
    // A matrix unit multiplies so fast that the transforms would take longer than what they save.
    const TileKernel &tile = op.narrow ? kernels.narrow : kernels.tile[op.a.type][op.a.type];
    if (tile.k_step > 8 && op.winograd != 2) return false;
    const uint32_t weights = widens(op) ? op.a.type : op.weight_type;
    const bool types = // transformed fp16 may not fit into fp16
        op.narrow ? op.a.type != FT_F16
                  : (op.a.type == FT_BF16 && weights == FT_BF16) ||
                        (op.a.type == FT_F32 && weights != FT_BF16);
    return op.winograd && types && op.side == 3 && op.stride == 1 && !op.upsample && !op.geglu &&
           !op.b.h && op.a.border && op.out.h % 2 == 0 && op.out.w % 2 == 0 &&
           (op.winograd >= 2 || int64_t(op.out.h) * op.out.w / 4 >= LEAST_TILES) &&
           op.a.c >= LEAST_CHANNELS && op.out.c >= LEAST_CHANNELS;
}

uint64_t winograd_scratch(const ft_op &op, const Kernels &, int threads) {
    const Plan plan = make_plan(op);
    return plan.pixel_bytes() + plan.thread() * threads;
}

void winograd_run(const ft_op &op, const Context &context) {
    const Kernels &kernels = *context.kernels;
    const Run run{op, context, make_plan(op),
                  op.narrow ? kernels.narrow : kernels.tile[op.a.type][op.a.type]};
    zero_border(op, context);
    for (int64_t row = 0; row < run.plan.down; row += run.plan.band_rows) run.band(row);
}

} // namespace ft
