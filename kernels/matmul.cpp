// Convolution and linear layers: one driver over every instruction set's tile of outputs.
//
// A filter tap is a shift of the row pointers, so a 3x3 convolution is nine matrix products over
// the same padded image and nothing is copied.  A job is a panel of 64 outputs by a chunk of
// pixels; the weights of a panel are cut so that they stay in the second-level cache while pixels
// stream past. Each output is summed by one thread in one order: results do not depend on the
// number of threads.
//
// Weights in few bits become those of the activations' type once per panel and chunk, or pixels
// become int8 once per op: Int8Pixels in scratch.
#include "internal.h"

namespace ft {
namespace {

constexpr int64_t PANEL_BYTES = 384 << 10; // of weights, in the second-level cache beside pixels
constexpr int64_t CHUNK_PIXELS = 384;      // times 64 sums in fp32: 96 KiB
constexpr int MAX_TAPS = 9;
constexpr int MAX_CHUNKS = 512;
constexpr uint32_t MAX_NARROW = 1 << 16; // channels: 255 * 127 times as many fit into an int32

struct Chunk { // of the inputs: some taps of one source, or some channels of one tap
    int source, tap, tap_count;
    int64_t k, k_count; // elements
    int64_t w;          // bytes into a block of weights
};

struct Pixels {                  // of a source, as they are multiplied
    int64_t row, pixel, element; // bytes
    int64_t reach;               // of its border, that is read as well
    int64_t bytes;               // of scratch; 0: they are multiplied where they are
};

struct Plan {
    int sources, taps, parities;
    int64_t k[2]; // padded channels of each source
    Pixels source[2];
    int64_t blocks;      // of LANES outputs in the weights
    int64_t panel_bytes; // of scratch for a chunk's weights; 0: they are multiplied as they lie
    int64_t w_block;     // bytes of a block
    int64_t pixels;      // per parity
    int64_t chunk_pixels, pixel_chunks, panels;
    int chunk_count;
    Chunk chunks[MAX_CHUNKS];
};

int64_t taps_of(const ft_op &op) { return op.upsample ? 4 : int64_t(op.side) * op.side; }

int64_t block_bytes(const ft_op &op) {
    return taps_of(op) * packed_bytes(op.weight_type, padded(op.a.c)) +
           (op.b.h ? packed_bytes(op.weight_type, padded(op.b.c)) : 0);
}

int64_t blocks_of(const ft_op &op) { return padded(op.out.c) / LANES * (op.geglu ? 2 : 1); }

int64_t chunk_limit(const ft_op &op) {
    return PANEL_BYTES / TILE / type_bytes(widens(op) ? op.a.type : op.weight_type);
}

Pixels pixels_of(const ft_op &op, const ft_tensor &t) {
    if (!op.narrow) return {bytes_of_row(t), bytes_of_pixel(t), type_bytes(t.type), 0, 0};
    const int64_t reach = op.side == 3 ? t.border : 0;
    const int64_t pixel = int64_t(sizeof(Int8Pixel)) + padded(t.c);
    const int64_t row = (t.w + 2 * reach) * pixel;
    return {row, pixel, 1, reach, round_up((t.h + 2 * reach) * row, 64)};
}

// Cut taps x channels of a source so that each piece is at most `limit` elements; -1: too many.
int cut(Chunk *chunks, int count, int source, int taps, int64_t channels, int64_t limit, int64_t w,
        uint32_t w_type) {
    const int64_t step = w_type == FT_I4 ? GROUP : LANES,
                  tap_bytes = packed_bytes(w_type, channels);
    const int64_t pieces = (channels + limit - 1) / limit;
    const int groups = pieces > 1 ? taps : int((taps * channels + limit - 1) / limit);
    for (int g = 0; g < groups; g++) {
        const int first = taps * g / groups, last = taps * (g + 1) / groups;
        for (int64_t p = 0; p < pieces; p++) {
            if (count == MAX_CHUNKS) return -1;
            const int64_t k0 = round_up(channels * p / pieces, step);
            const int64_t k1 =
                p + 1 == pieces ? channels : round_up(channels * (p + 1) / pieces, step);
            chunks[count++] = {source, first,   last - first,
                               k0,     k1 - k0, w + first * tap_bytes + packed_bytes(w_type, k0)};
        }
    }
    return count;
}

bool make_plan(Plan &plan, const ft_op &op, int threads) {
    plan.sources = op.b.h ? 2 : 1;
    plan.taps = int(taps_of(op));
    plan.parities = op.upsample ? 4 : 1;
    plan.k[0] = padded(op.a.c);
    plan.k[1] = op.b.h ? padded(op.b.c) : 0;
    plan.source[0] = pixels_of(op, op.a);
    plan.source[1] = op.b.h ? pixels_of(op, op.b) : Pixels();
    plan.blocks = blocks_of(op);
    plan.w_block = block_bytes(op);
    int64_t limit = chunk_limit(op);
    if (op.narrow) // a tap's whole numbers are summed at once
        for (int64_t k : plan.k) limit = limit < k ? k : limit;
    plan.pixels = op.upsample ? int64_t(op.a.h) * op.a.w : int64_t(op.out.h) * op.out.w;
    plan.panels = (plan.blocks + MAX_BLOCKS - 1) / MAX_BLOCKS;
    plan.chunk_pixels = CHUNK_PIXELS;
    while (plan.chunk_pixels > 48 && // few pixels: enough jobs for every thread all the same
           plan.panels * plan.parities *
                   ((plan.pixels + plan.chunk_pixels - 1) / plan.chunk_pixels) <
               4 * threads)
        plan.chunk_pixels /= 2;
    plan.pixel_chunks = (plan.pixels + plan.chunk_pixels - 1) / plan.chunk_pixels;
    plan.chunk_count = cut(plan.chunks, 0, 0, plan.taps, plan.k[0], limit, 0, op.weight_type);
    if (plan.sources == 2 && plan.chunk_count >= 0)
        plan.chunk_count = cut(plan.chunks, plan.chunk_count, 1, 1, plan.k[1], limit,
                               plan.taps * packed_bytes(op.weight_type, plan.k[0]), op.weight_type);
    plan.panel_bytes = 0;
    if (widens(op))
        for (int c = 0; c < plan.chunk_count; c++) {
            const int64_t k = plan.chunks[c].tap_count * plan.chunks[c].k_count;
            const int64_t bytes = k * TILE * type_bytes(op.a.type);
            if (bytes > plan.panel_bytes) plan.panel_bytes = bytes;
        }
    return plan.chunk_count > 0;
}

const char *check(const ft_op &op) {
    const ft_tensor &a = op.a, &out = op.out;
    if (op.side != 1 && op.side != 3) return "side is neither 1 nor 3";
    if (op.stride != 1 && op.stride != 2) return "stride is neither 1 nor 2";
    if (op.pad != (op.side == 3) && !(op.pad == 0 && op.side == 3 && op.stride == 2))
        return "pad does not fit the side";
    const bool few_bits = op.weight_type == FT_I8 || op.weight_type == FT_I4;
    if (a.type > FT_F16 || (op.weight_type > FT_F16 && !few_bits) || out.type > FT_F16)
        return "unknown type";
    if (op.narrow < 0 || op.narrow > 1 || (op.narrow && op.weight_type != FT_I8))
        return "narrow is for weights of int8";
    if (op.narrow && (a.c > MAX_NARROW || op.b.c > MAX_NARROW)) return "too many input channels";
    if (op.weight_type == FT_I8 && op.scales == FT_NO_WEIGHT) return "no scales";
    if (op.upsample) {
        if (op.side != 3 || op.stride != 1 || op.geglu || !a.border) return "malformed upsample";
        if (out.h != 2 * a.h || out.w != 2 * a.w) return "upsample needs twice the size";
    } else {
        const int64_t low = -int64_t(op.pad), b = a.border;
        const int64_t bottom = low + int64_t(out.h - 1) * op.stride + op.side - 1;
        const int64_t right = low + int64_t(out.w - 1) * op.stride + op.side - 1;
        if (low < -b || bottom >= a.h + b || right >= a.w + b) return "reads past the border of a";
    }
    if (op.b.h && (op.side != 1 || op.upsample || op.b.h != a.h || op.b.w != a.w ||
                   op.b.type != a.type || op.stride != 1))
        return "b is not beside a";
    if (op.c.h && (op.c.h != out.h || op.c.w != out.w || op.c.c != out.c || op.c.type != out.type))
        return "the residual is not like out";
    if (op.add.h &&
        (op.add.h != 1 || op.add.w != 1 || op.add.c != out.c || op.add.type != FT_F32 || op.geglu))
        return "the vector to add does not fit";
    if (op.act > FT_RELU) return "unknown activation";
    if (op.geglu && (op.act || op.late)) return "geglu has an activation of its own";
    if (op.weight == FT_NO_WEIGHT) return "no weight";
    Plan plan;
    if (!make_plan(plan, op, 1)) return "too many input channels";
    return nullptr;
}

uint64_t sum_bytes(const Plan &plan) {
    return (plan.chunk_count > 1 ? round_up(plan.chunk_pixels, MAX_ROWS) : MAX_ROWS) * TILE *
           sizeof(float);
}

uint64_t thread_scratch(const Plan &plan) { return sum_bytes(plan) + plan.panel_bytes; }

uint64_t source_bytes(const Plan &plan) {
    return uint64_t(plan.source[0].bytes + plan.source[1].bytes);
}

uint64_t scratch(const ft_op &op, const Kernels &kernels, int threads) {
    if (winograd_fits(op, kernels)) return winograd_scratch(op, kernels, threads);
    Plan plan;
    if (!make_plan(plan, op, threads)) return UINT64_MAX;
    return source_bytes(plan) + thread_scratch(plan) * threads;
}

uint64_t weight_bytes(const ft_op &op) {
    return uint64_t(blocks_of(op)) * block_bytes(op) * (op.upsample ? 4 : 1);
}

uint64_t bias_bytes(const ft_op &op) { return blocks_of(op) * LANES * sizeof(float); }

// What a job needs of the op, found once.
struct Run {
    const ft_op &op;
    const Context &context;
    const Plan &plan;
    TileKernel kernel;

    // Pixels of the output, or of one parity of it, in order from `pixel`: f(row, y, x).
    template <class F> void each_pixel(int64_t pixel, int rows, const F &f) const {
        const int64_t width = op.upsample ? op.a.w : op.out.w;
        int64_t y = pixel / width, x = pixel % width;
        for (int r = 0; r < rows; r++) {
            f(r, y, x);
            if (++x == width) x = 0, y++;
        }
    }

    // Pixel (0, 0) of a source, as it is multiplied.
    char *first_pixel(int source) const {
        if (!op.narrow) return context.at(source ? op.b : op.a);
        const Pixels &s = plan.source[source];
        return context.arena + op.scratch + (source ? plan.source[0].bytes : 0) +
               s.reach * (s.row + s.pixel) + sizeof(Int8Pixel);
    }

    // Rows of a source, its border among them, to int8.
    void to_int8(int source) const {
        const ft_tensor &t = source ? op.b : op.a;
        const Pixels &s = plan.source[source];
        char *const first = first_pixel(source) - sizeof(Int8Pixel);
        context.pool->each(t.h + 2 * s.reach, [&](int64_t y, int) {
            for (int64_t x = -s.reach; x < t.w + s.reach; x++)
                context.kernels->to_int8(first + (y - s.reach) * s.row + x * s.pixel,
                                         context.at(t, y - s.reach, x), t.type, int(padded(t.c)));
        });
    }

    // A panel's weights of a chunk.
    struct Weights {
        const char *first;
        int64_t block; // bytes from one to the next
    };

    Weights weights(const Chunk &chunk, int parity, int64_t panel, char *room) const {
        const char *w = context.weights + op.weight + chunk.w +
                        (parity * plan.blocks + panel * MAX_BLOCKS) * plan.w_block;
        if (!widens(op)) return {w, plan.w_block};
        const int64_t tap = chunk.k_count * LANES * type_bytes(op.a.type);
        const int64_t packed = packed_bytes(op.weight_type, plan.k[chunk.source]);
        const Weights made = {room, chunk.tap_count * tap};
        const int64_t left = plan.blocks - panel * MAX_BLOCKS;
        for (int64_t b = 0; b < left && b < MAX_BLOCKS; b++)
            for (int64_t i = 0; i < chunk.tap_count; i++)
                context.kernels->widen(room + b * made.block + i * tap, op.a.type,
                                       w + b * plan.w_block + i * packed, op.weight_type,
                                       chunk.k_count);
        return made;
    }

    void sums(float *acc, const Chunk &chunk, const Weights &w, int64_t pixel, int rows, int parity,
              int64_t panel, bool add) const {
        const Pixels &source = plan.source[chunk.source];
        const char *const first = first_pixel(chunk.source);
        const char *row[MAX_ROWS];
        const int64_t step = op.upsample ? 1 : op.stride;
        const int64_t down = op.upsample ? (parity >> 1) - 1 : -op.pad;
        const int64_t right = op.upsample ? (parity & 1) - 1 : -op.pad;
        each_pixel(pixel, rows, [&](int r, int64_t y, int64_t x) {
            row[r] = first + (y * step + down) * source.row + (x * step + right) * source.pixel;
        });
        int64_t taps[MAX_TAPS];
        const int side = op.upsample ? 2 : op.side;
        for (int i = 0; i < chunk.tap_count; i++) {
            const int tap = chunk.tap + i;
            taps[i] =
                (tap / side) * source.row + (tap % side) * source.pixel + chunk.k * source.element;
        }
        const int blocks = int(plan.blocks - panel * MAX_BLOCKS);
        for (int b = 0; b < (blocks < MAX_BLOCKS ? blocks : MAX_BLOCKS); b += kernel.blocks) {
            const int left = (blocks < MAX_BLOCKS ? blocks : MAX_BLOCKS) - b;
            kernel.run({row, taps, chunk.tap_count, int32_t(chunk.k_count), w.first + b * w.block,
                        w.block, rows, left < kernel.blocks ? left : kernel.blocks, add, TILE,
                        acc + b * LANES});
        }
    }

    // What finish() will touch is on its way while the sums are made.
    void fetch(int64_t pixel, int rows, int parity, int64_t panel) const {
        const int64_t channel = panel * TILE / (op.geglu ? 2 : 1), size = type_bytes(op.out.type);
        const int64_t bytes = (op.geglu ? TILE / 2 : TILE) * size;
        each_pixel(pixel, rows, [&](int, int64_t y, int64_t x) {
            if (op.upsample) y = 2 * y + (parity >> 1), x = 2 * x + (parity & 1);
            for (int64_t line = 0; line < bytes; line += 64) {
                __builtin_prefetch(context.at(op.out, y, x) + channel * size + line, 1, 3);
                if (op.c.h)
                    __builtin_prefetch(context.at(op.c, y, x) + channel * size + line, 0, 3);
            }
        });
    }

    void finish(const float *acc, int64_t pixel, int rows, int parity, int64_t panel) const {
        const int64_t first = panel * MAX_BLOCKS, left = plan.blocks - first;
        int64_t ys[MAX_ROWS], xs[MAX_ROWS];
        each_pixel(pixel, rows, [&](int r, int64_t y, int64_t x) {
            ys[r] = op.upsample ? 2 * y + (parity >> 1) : y;
            xs[r] = op.upsample ? 2 * x + (parity & 1) : x;
        });
        finish_pixels(op, context, acc, parity, first, int(left < MAX_BLOCKS ? left : MAX_BLOCKS),
                      rows, ys, xs);
    }

    void job(int64_t index, int thread, bool pixels_outer) const {
        const int64_t per_parity = plan.panels * plan.pixel_chunks;
        const int parity = int(index / per_parity);
        index %= per_parity;
        const int64_t panel = pixels_outer ? index % plan.panels : index / plan.pixel_chunks;
        const int64_t chunk = pixels_outer ? index / plan.panels : index % plan.pixel_chunks;
        const int64_t start = chunk * plan.chunk_pixels;
        const int64_t end =
            start + plan.chunk_pixels < plan.pixels ? start + plan.chunk_pixels : plan.pixels;
        char *const room =
            context.arena + op.scratch + source_bytes(plan) + thread * thread_scratch(plan);
        float *acc = reinterpret_cast<float *>(room);
        for (int c = 0; c < plan.chunk_count; c++) {
            const bool last = c + 1 == plan.chunk_count;
            const Weights w = weights(plan.chunks[c], parity, panel, room + sum_bytes(plan));
            for (int64_t p = start; p < end; p += kernel.rows) {
                const int rows = int(end - p < kernel.rows ? end - p : kernel.rows);
                float *sum = plan.chunk_count > 1 ? acc + (p - start) * TILE : acc;
                if (last) fetch(p, rows, parity, panel);
                sums(sum, plan.chunks[c], w, p, rows, parity, panel, c > 0);
                if (last) finish(sum, p, rows, parity, panel);
            }
        }
    }
};

void run(const ft_op &op, const Context &context) {
    if (winograd_fits(op, *context.kernels)) return winograd_run(op, context);
    Plan plan;
    make_plan(plan, op, context.pool->threads());
    const Run run{op, context, plan, tile_of(op, *context.kernels)};
    // Panels outside: pixels are read once per panel.  Pixels outside: weights once per chunk.
    const int64_t pixel_bytes = plan.pixels * (plan.k[0] + plan.k[1]) * plan.source[0].element;
    const int64_t weight_bytes = plan.blocks * plan.w_block;
    const bool pixels_outer =
        plan.pixel_chunks * weight_bytes + pixel_bytes < plan.panels * pixel_bytes + weight_bytes;
    zero_border(op, context);
    for (int source = 0; op.narrow && source < plan.sources; source++) run.to_int8(source);
    context.pool->each(plan.parities * plan.panels * plan.pixel_chunks,
                       [&](int64_t i, int thread) { run.job(i, thread, pixels_outer); });
}

} // namespace

uint64_t scale_bytes(const ft_op &op) {
    if (op.kind != FT_MATMUL || op.weight_type != FT_I8) return 0;
    return bias_bytes(op) * (op.upsample ? 4 : 1);
}

void finish_pixels(const ft_op &op, const Context &context, const float *acc, int parity,
                   int64_t first, int blocks, int rows, const int64_t *ys, const int64_t *xs,
                   const float *scales) {
    const int64_t channel = (op.geglu ? first / 2 : first) * LANES; // of out
    const int64_t offset = channel * type_bytes(op.out.type);
    const float *scale = scales, *bias = nullptr, *add = nullptr;
    if (!scale && op.scales != FT_NO_WEIGHT)
        scale = reinterpret_cast<const float *>(context.weights + op.scales) +
                (parity * blocks_of(op) + first) * LANES;
    if (op.bias != FT_NO_WEIGHT)
        bias = reinterpret_cast<const float *>(context.weights + op.bias) + first * LANES;
    if (op.add.h) add = reinterpret_cast<const float *>(context.at(op.add)) + channel;
    const char *residual[MAX_ROWS];
    char *out[MAX_ROWS];
    for (int r = 0; r < rows; r++) {
        out[r] = context.at(op.out, ys[r], xs[r]) + offset;
        if (op.c.h) residual[r] = context.at(op.c, ys[r], xs[r]) + offset;
    }
    context.kernels->finish({acc, scale, bias, add, op.c.h ? residual : nullptr, out, rows,
                             op.geglu ? blocks / 2 : blocks, op.out.type, op.act, op.geglu,
                             op.late});
}

const Op matmul_op = {check, scratch, weight_bytes, bias_bytes, run};

} // namespace ft
