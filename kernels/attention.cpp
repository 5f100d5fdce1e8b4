// Attention with an online softmax: scores exist for a block of queries by a block of keys at a
// time.
//
// Keys and values of each head are first packed like weights, so that both products run on the same
// tiles as every matrix product.  Milakov & Gimelshein 2018; Dao et al. 2022.
//
// Of int8 (`narrow`): a query has a scale of its own, a block of keys one together, without their
// mean over all tokens, which softmax does not see (Zhang et al. 2025, SageAttention).  Weights are
// 127ths of the largest of their row and block, values have a scale by channel.
#include <math.h>

#include "internal.h"

namespace ft {
namespace {

constexpr int64_t KEYS = 512;   // in a block: 48 x 256 scores in fp32 are 48 KiB
constexpr int64_t QUERIES = 24; // about; a multiple of the tile's rows
constexpr int MAX_SIZE = 4096;  // channels of a head
constexpr float LOG2E = 1.44269504f;

struct Plan {
    int64_t size;   // channels of a head
    int64_t k;      // the same, padded for the products over it
    int64_t blocks; // of values: the same in blocks of LANES
    int64_t queries, keys, keys_padded;
    int64_t query_rows, query_blocks;
    bool narrow;
    int64_t type_bytes, element; // of a tensor's element; of one that is multiplied

    int64_t width() const { return blocks * LANES; }
    int64_t head_keys() const { return keys_padded * k * element; }
    int64_t head_values() const { return width() * keys_padded * element; }
    int64_t key_blocks() const { return (keys_padded + KEYS - 1) / KEYS; }
    // Of int8: scales of values, the mean of keys, and scales of blocks of keys.
    int64_t head_floats() const {
        return narrow ? round_up((2 * width() + key_blocks()) * int64_t(sizeof(float)), 64) : 0;
    }
    int64_t head() const { return head_keys() + head_values() + head_floats(); }
    // A row that is multiplied: what is before it, and from one to the next.
    int64_t lead() const { return narrow ? int64_t(sizeof(Int8Pixel)) : 0; }
    int64_t query_row() const { return narrow ? lead() + width() : k * element; }
    int64_t weight_row() const { return lead() + KEYS * element; }
    // One thread's: queries, scores, weights, sums, the maximum and the sum of each row.
    int64_t packed_queries() const { return round_up(query_rows * query_row(), 64); }
    int64_t scores() const { return query_rows * KEYS * sizeof(float); }
    int64_t weights() const { return round_up(query_rows * weight_row(), 64); }
    int64_t sums() const { return query_rows * width() * sizeof(float); }
    int64_t thread() const {
        return packed_queries() + scores() + weights() + sums() +
               round_up(2 * query_rows * sizeof(float), 64) + round_up(width() * 4, 64);
    }
};

int64_t tokens(const ft_tensor &t) { return int64_t(t.h) * t.w; }

const TileKernel &tile_for(const ft_op &op, const Kernels &kernels) {
    return op.narrow ? kernels.narrow : kernels.tile[op.a.type][op.a.type];
}

Plan make_plan(const ft_op &op, const Kernels &kernels) {
    const TileKernel &kernel = tile_for(op, kernels);
    const int64_t step = kernel.k_step;
    Plan plan;
    plan.size = op.size;
    plan.k = round_up(op.size, step);
    plan.blocks = (op.size + LANES - 1) / LANES;
    plan.queries = tokens(op.a);
    plan.keys = tokens(op.b);
    plan.keys_padded = round_up(plan.keys, step > LANES ? step : LANES);
    plan.query_rows = round_up(QUERIES, kernel.rows);
    plan.query_blocks = (plan.queries + plan.query_rows - 1) / plan.query_rows;
    plan.narrow = op.narrow;
    plan.type_bytes = type_bytes(op.a.type);
    plan.element = plan.narrow ? 1 : plan.type_bytes;
    return plan;
}

const char *check(const ft_op &op) {
    const ft_tensor &a = op.a, &b = op.b, &c = op.c, &out = op.out;
    if (op.heads < 1 || op.size < 1 || op.heads > 4096 || op.size > MAX_SIZE) return "no heads";
    const uint32_t channels = uint32_t(op.heads) * uint32_t(op.size);
    if (a.c != channels || b.c != channels || c.c != channels || out.c != channels)
        return "channels are not heads times size";
    if (a.type > FT_F16 || b.type != a.type || c.type != a.type || out.type != a.type)
        return "queries, keys, values and out are not of one type";
    if (out.h != a.h || out.w != a.w || b.h != c.h || b.w != c.w || !b.h)
        return "queries and out, or keys and values, differ in size";
    if (op.narrow < 0 || op.narrow > 1) return "narrow is neither 0 nor 1";
    if (op.causal && (tokens(a) != tokens(b))) return "causal needs as many keys as queries";
    return nullptr;
}

uint64_t scratch(const ft_op &op, const Kernels &kernels, int threads) {
    const Plan plan = make_plan(op, kernels);
    return uint64_t(op.heads) * plan.head() + plan.thread() * threads;
}

uint64_t none(const ft_op &) { return 0; }

struct Run {
    const ft_op &op;
    const Context &context;
    const Plan plan;
    const TileKernel kernel;

    char *token(const ft_tensor &t, int64_t i) const { return context.at(t, i / t.w, i % t.w); }
    char *keys_of(int64_t head) const { return context.arena + op.scratch + head * plan.head(); }
    char *values_of(int64_t head) const { return keys_of(head) + plan.head_keys(); }
    float *value_scales(int64_t head) const {
        return reinterpret_cast<float *>(values_of(head) + plan.head_values());
    }
    float *mean_of(int64_t head) const { return value_scales(head) + plan.width(); }
    float *key_scales(int64_t head) const { return mean_of(head) + plan.width(); }
    char *thread_scratch(int thread) const { return keys_of(op.heads) + thread * plan.thread(); }

    // T: as wide as an element; STEP: elements of k that lie side by side, 2 for bf16.
    template <class T, int STEP> void pack_keys(int64_t head, int64_t block) const {
        T *out = reinterpret_cast<T *>(keys_of(head)) + block * plan.k * LANES;
        memset(out, 0, plan.k * LANES * sizeof(T));
        for (int64_t n = 0; n < LANES && block * LANES + n < plan.keys; n++) {
            const T *key =
                reinterpret_cast<const T *>(token(op.b, block * LANES + n)) + head * op.size;
            T *lane = out + n * STEP;
            int64_t k = 0;
            for (; k + STEP <= plan.size; k += STEP)
                memcpy(lane + k * LANES, key + k, STEP * sizeof(T));
            if (k < plan.size) lane[k * LANES] = key[k];
        }
    }

    // STEP keys lie side by side; a block of LANES channels of all keys follows the other.
    template <class T, int STEP> void pack_values(int64_t head, int64_t block) const {
        T *values = reinterpret_cast<T *>(values_of(head));
        for (int64_t key = block * LANES; key < (block + 1) * LANES; key += STEP) {
            const T *rows[STEP];
            for (int i = 0; i < STEP; i++)
                rows[i] = key + i < plan.keys
                              ? reinterpret_cast<const T *>(token(op.c, key + i)) + head * op.size
                              : nullptr;
            for (int64_t b = 0; b < plan.blocks; b++) {
                T *out = values + (b * plan.keys_padded + key) * LANES;
                const int64_t left = plan.size - b * LANES, count = left < LANES ? left : LANES;
                if (count < LANES || !rows[STEP - 1]) memset(out, 0, STEP * LANES * sizeof(T));
                for (int i = 0; i < STEP; i++)
                    if (rows[i])
                        for (int64_t n = 0; n < count; n++)
                            out[n * STEP + i] = rows[i][b * LANES + n];
            }
        }
    }

    // --- int8 -----------------------------------------------------------------------------------

    // A head's channels of a token as floats; zeros where there is none.
    void floats(float *out, const ft_tensor &t, int64_t i, int64_t head) const {
        const int n = op.size;
        if (i >= tokens(t)) return void(memset(out, 0, n * sizeof(float)));
        const char *const x = token(t, i) + head * n * plan.type_bytes;
        const uint16_t *const half = reinterpret_cast<const uint16_t *>(x);
        if (t.type == FT_F32) memcpy(out, x, n * sizeof(float));
        for (int c = 0; c < n && t.type == FT_BF16; c++) out[c] = bf16_to_float(half[c]);
        for (int c = 0; c < n && t.type == FT_F16; c++) out[c] = f16_to_float(half[c]);
    }
    void centred_key(float *out, int64_t i, int64_t head, const float *mean) const {
        const int n = op.size;
        floats(out, op.b, i, head);
        for (int c = 0; c < n; c++) out[c] -= mean[c];
    }

    // As bits, magnitudes are in order, with what is not finite above all others.
    static int32_t magnitude(float x) { return int32_t(float_bits(x) & 0x7fffffff); }
    static float scale_of(int32_t largest) {
        const float x = bits_float(uint32_t(largest));
        return largest >= 0x7f800000 ? NAN : x >= LEAST_PIXEL ? x / 127 : 0;
    }
    static float inverse(float scale) { return scale > 0 ? 1 / scale : 0; }
    // To the nearest, ties away from zero, with integers: a compiler may fuse a product and a sum.
    static int8_t whole(float x, float per) {
        const int32_t halves = int32_t(x * per * 2);
        return int8_t((halves + 1 + (halves >> 31)) >> 1);
    }

    // The mean of a head's keys by channel, and the scales of its values.
    void survey(int64_t head) const {
        const int n = op.size;
        float *const mean = mean_of(head), *const scale = value_scales(head);
        float row[MAX_SIZE], sum[MAX_SIZE] = {};
        int32_t largest[MAX_SIZE] = {};
        for (int64_t i = 0; i < plan.keys; i++) {
            floats(row, op.b, i, head);
            for (int c = 0; c < n; c++) sum[c] += row[c];
            floats(row, op.c, i, head);
            for (int c = 0; c < n; c++) {
                const int32_t size = magnitude(row[c]);
                largest[c] = largest[c] < size ? size : largest[c];
            }
        }
        for (int c = 0; c < n; c++) mean[c] = sum[c] / float(plan.keys);
        for (int c = 0; c < plan.width(); c++) scale[c] = c < n ? scale_of(largest[c]) : 0;
    }

    void pack_keys_int8(int64_t head, int64_t block) const {
        const int n = op.size;
        const int64_t first = block * KEYS;
        const int64_t end = first + KEYS < plan.keys_padded ? first + KEYS : plan.keys_padded;
        const float *const mean = mean_of(head);
        float row[MAX_SIZE];
        int32_t largest = 0;
        for (int64_t i = first; i < end && i < plan.keys; i++) {
            centred_key(row, i, head, mean);
            for (int c = 0; c < n; c++)
                largest = largest < magnitude(row[c]) ? magnitude(row[c]) : largest;
        }
        const float scale = key_scales(head)[block] = scale_of(largest);
        int8_t values[MAX_SIZE + LANES] = {};
        for (int64_t i = first; i < end; i++) {
            const float per = i < plan.keys ? inverse(scale) : 0;
            centred_key(row, i, head, mean);
            for (int c = 0; c < n; c++) values[c] = whole(row[c], per);
            char *const lane = keys_of(head) + i / LANES * plan.k * LANES + i % LANES * 4;
            for (int64_t c = 0; c < plan.k; c += 4) memcpy(lane + c * LANES, values + c, 4);
        }
    }

    void pack_values_int8(int64_t head, int64_t block) const {
        const int n = op.size;
        const float *const scale = value_scales(head);
        float row[MAX_SIZE], per[MAX_SIZE];
        uint32_t four[MAX_SIZE + LANES] = {}; // keys of a channel, side by side
        for (int c = 0; c < n; c++) per[c] = inverse(scale[c]);
        for (int64_t key = block * LANES; key < (block + 1) * LANES; key += 4) {
            for (int i = 0; i < 4; i++) {
                floats(row, op.c, key + i, head);
                for (int c = 0; c < n; c++) {
                    const uint32_t byte = uint8_t(whole(row[c], per[c]));
                    four[c] = four[c] >> 8 | byte << 24;
                }
            }
            for (int64_t b = 0; b < plan.blocks; b++)
                memcpy(values_of(head) + (b * plan.keys_padded + key) * LANES, four + b * LANES,
                       LANES * sizeof *four);
        }
    }

    void pack(int64_t head, int64_t block) const {
        if (plan.narrow) return pack_values_int8(head, block);
        switch (op.a.type) {
        case FT_BF16:
            pack_keys<uint16_t, 2>(head, block);
            pack_values<uint16_t, 2>(head, block);
            break;
        case FT_F16:
            pack_keys<uint16_t, 1>(head, block);
            pack_values<uint16_t, 1>(head, block);
            break;
        default: pack_keys<float, 1>(head, block); pack_values<float, 1>(head, block);
        }
    }

    // acc[row][n] (+)= a[row] . w[n], rows of `a` in a row of memory
    void product(const char *a, int64_t a_row, const char *w, int64_t w_block, int64_t k,
                 int64_t rows, int64_t blocks, float *acc, int64_t stride, bool add) const {
        const int64_t tap = 0;
        for (int64_t b = 0; b < blocks; b += kernel.blocks)
            for (int64_t r = 0; r < rows; r += kernel.rows) {
                const char *row[MAX_ROWS];
                const int count = int(rows - r < kernel.rows ? rows - r : kernel.rows);
                for (int i = 0; i < count; i++) row[i] = a + (r + i) * a_row + plan.lead();
                kernel.run({row, &tap, 1, int32_t(k), w + b * w_block, w_block, count,
                            int32_t(blocks - b < kernel.blocks ? blocks - b : kernel.blocks), add,
                            int32_t(stride), acc + r * stride + b * LANES});
            }
    }

    void pack_query(char *q, int64_t i, int64_t head, char *room) const {
        const int64_t size = op.size * plan.type_bytes;
        char *const x = plan.narrow ? room : q;
        const int64_t bytes = plan.narrow ? plan.width() * plan.type_bytes : plan.query_row();
        memcpy(x, token(op.a, i) + head * size, size);
        memset(x + size, 0, bytes - size);
        if (plan.narrow) context.kernels->to_int8(q, room, op.a.type, int(plan.width()));
    }

    void attend(int64_t head, int64_t block, int thread) const {
        const int64_t first = block * plan.query_rows, size = plan.type_bytes;
        const int64_t rows =
            plan.queries - first < plan.query_rows ? plan.queries - first : plan.query_rows;
        const int64_t width = plan.width();
        char *queries = thread_scratch(thread);
        float *scores = reinterpret_cast<float *>(queries + plan.packed_queries());
        char *weights = reinterpret_cast<char *>(scores) + plan.scores();
        float *sums = reinterpret_cast<float *>(weights + plan.weights());
        float *top = reinterpret_cast<float *>(reinterpret_cast<char *>(sums) + plan.sums());
        float *sum = top + plan.query_rows;
        char *row =
            reinterpret_cast<char *>(top) + round_up(2 * plan.query_rows * sizeof(float), 64);
        for (int64_t r = 0; r < rows; r++) {
            pack_query(queries + r * plan.query_row(), first + r, head, row);
            top[r] = -INFINITY;
            sum[r] = 0;
        }
        const uint32_t type = plan.narrow ? uint32_t(FT_I8) : op.a.type;
        for (int64_t key = 0; key < plan.keys_padded; key += KEYS) {
            if (op.causal && key > first + rows - 1) break;
            const int64_t here = plan.keys_padded - key < KEYS ? plan.keys_padded - key : KEYS;
            product(queries, plan.query_row(), keys_of(head) + key * plan.k * plan.element,
                    plan.k * LANES * plan.element, plan.k, rows, here / LANES, scores, KEYS, false);
            float scale = op.scale * LOG2E;
            if (plan.narrow) scale *= key_scales(head)[key / KEYS];
            for (int64_t r = 0; r < rows; r++) {
                const int64_t end = op.causal ? first + r + 1 : plan.keys;
                const int64_t valid = end - key < 0 ? 0 : end - key < here ? end - key : here;
                const float alpha = context.kernels->softmax(
                    {scores + r * KEYS, int(valid), int(here), scale, top + r, sum + r,
                     weights + r * plan.weight_row(), type});
                if (key && alpha != 1)
                    context.kernels->rescale(sums + r * width, alpha, int(width));
            }
            product(weights, plan.weight_row(), values_of(head) + key * LANES * plan.element,
                    plan.keys_padded * LANES * plan.element, here, rows, plan.blocks, sums, width,
                    key > 0);
        }
        const int64_t spare = padded(op.out.c) - op.out.c;
        for (int64_t r = 0; r < rows; r++) {
            float *const of_row = sums + r * width;
            for (int64_t c = 0; c < width && plan.narrow; c++) of_row[c] *= value_scales(head)[c];
            context.kernels->scaled(row, op.out.type, of_row, 1 / sum[r], int(width));
            char *out = token(op.out, first + r);
            memcpy(out + head * op.size * size, row, op.size * size);
            if (head + 1 == op.heads) memset(out + op.out.c * size, 0, spare * size);
        }
    }
};

void run(const ft_op &op, const Context &context) {
    const Run run{op, context, make_plan(op, *context.kernels), tile_for(op, *context.kernels)};
    const int64_t lanes = run.plan.keys_padded / LANES, query_blocks = run.plan.query_blocks;
    zero_border(op, context);
    if (op.narrow) {
        const int64_t blocks = run.plan.key_blocks();
        context.pool->each(op.heads, [&](int64_t i, int) { run.survey(i); });
        context.pool->each(op.heads * blocks,
                           [&](int64_t i, int) { run.pack_keys_int8(i / blocks, i % blocks); });
    }
    context.pool->each(op.heads * lanes, [&](int64_t i, int) { run.pack(i / lanes, i % lanes); });
    context.pool->each(op.heads * query_blocks, [&](int64_t i, int thread) {
        run.attend(i / query_blocks, i % query_blocks, thread);
    });
}

} // namespace

const Op attention_op = {check, scratch, none, none, run};

} // namespace ft
