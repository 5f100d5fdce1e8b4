// Attention with an online softmax: scores exist for a block of queries by a block of keys at a
// time.
//
// Keys and values of each head are first packed like weights, so that both products run on the same
// tiles as every matrix product.  Milakov & Gimelshein 2018; Dao et al. 2022.
#include <math.h>

#include "internal.h"

namespace ft {
namespace {

constexpr int64_t KEYS = 512;   // in a block: 48 x 256 scores in fp32 are 48 KiB
constexpr int64_t QUERIES = 24; // about; a multiple of the tile's rows
constexpr float LOG2E = 1.44269504f;

struct Plan {
    int64_t size;   // channels of a head
    int64_t k;      // the same, padded for the products over it
    int64_t blocks; // of values: the same in blocks of LANES
    int64_t queries, keys, keys_padded;
    int64_t query_rows, query_blocks;
    int type_bytes;

    int64_t head_keys() const { return keys_padded * k * type_bytes; }
    int64_t head_values() const { return blocks * LANES * keys_padded * type_bytes; }
    // One thread's: queries, scores, weights, sums, the maximum and the sum of each row.
    int64_t packed_queries() const { return round_up(query_rows * k * type_bytes, 64); }
    int64_t scores() const { return query_rows * KEYS * sizeof(float); }
    int64_t weights() const { return query_rows * KEYS * type_bytes; }
    int64_t sums() const { return query_rows * blocks * LANES * sizeof(float); }
    int64_t thread() const {
        return packed_queries() + scores() + weights() + sums() +
               round_up(2 * query_rows * sizeof(float), 64) + round_up(blocks * LANES * 4, 64);
    }
};

int64_t tokens(const ft_tensor &t) { return int64_t(t.h) * t.w; }

Plan make_plan(const ft_op &op, const Kernels &kernels) {
    const TileKernel &kernel = kernels.tile[op.a.type][op.a.type];
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
    plan.type_bytes = type_bytes(op.a.type);
    return plan;
}

const char *check(const ft_op &op) {
    const ft_tensor &a = op.a, &b = op.b, &c = op.c, &out = op.out;
    if (op.heads < 1 || op.size < 1 || op.heads > 4096 || op.size > 4096) return "no heads";
    const uint32_t channels = uint32_t(op.heads) * uint32_t(op.size);
    if (a.c != channels || b.c != channels || c.c != channels || out.c != channels)
        return "channels are not heads times size";
    if (a.type > FT_F16 || b.type != a.type || c.type != a.type || out.type != a.type)
        return "queries, keys, values and out are not of one type";
    if (out.h != a.h || out.w != a.w || b.h != c.h || b.w != c.w || !b.h)
        return "queries and out, or keys and values, differ in size";
    if (op.causal && (tokens(a) != tokens(b))) return "causal needs as many keys as queries";
    return nullptr;
}

uint64_t scratch(const ft_op &op, const Kernels &kernels, int threads) {
    const Plan plan = make_plan(op, kernels);
    return uint64_t(op.heads) * (plan.head_keys() + plan.head_values()) + plan.thread() * threads;
}

uint64_t none(const ft_op &) { return 0; }

struct Run {
    const ft_op &op;
    const Context &context;
    const Plan plan;
    const TileKernel kernel;

    char *token(const ft_tensor &t, int64_t i) const { return context.at(t, i / t.w, i % t.w); }
    char *keys_of(int64_t head) const {
        return context.arena + op.scratch + head * (plan.head_keys() + plan.head_values());
    }
    char *values_of(int64_t head) const { return keys_of(head) + plan.head_keys(); }
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

    void pack(int64_t head, int64_t block) const {
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
                for (int i = 0; i < count; i++) row[i] = a + (r + i) * a_row;
                kernel.run({row, &tap, 1, int32_t(k), w + b * w_block, w_block, count,
                            int32_t(blocks - b < kernel.blocks ? blocks - b : kernel.blocks), add,
                            int32_t(stride), acc + r * stride + b * LANES});
            }
    }

    void attend(int64_t head, int64_t block, int thread) const {
        const int64_t first = block * plan.query_rows, size = plan.type_bytes;
        const int64_t rows =
            plan.queries - first < plan.query_rows ? plan.queries - first : plan.query_rows;
        const int64_t width = plan.blocks * LANES;
        char *queries = thread_scratch(thread);
        float *scores = reinterpret_cast<float *>(queries + plan.packed_queries());
        char *weights = reinterpret_cast<char *>(scores) + plan.scores();
        float *sums = reinterpret_cast<float *>(weights + plan.weights());
        float *top = reinterpret_cast<float *>(reinterpret_cast<char *>(sums) + plan.sums());
        float *sum = top + plan.query_rows;
        for (int64_t r = 0; r < rows; r++) {
            char *q = queries + r * plan.k * size;
            memcpy(q, token(op.a, first + r) + head * op.size * size, op.size * size);
            memset(q + op.size * size, 0, (plan.k - op.size) * size);
            top[r] = -INFINITY;
            sum[r] = 0;
        }
        for (int64_t key = 0; key < plan.keys_padded; key += KEYS) {
            if (op.causal && key > first + rows - 1) break;
            const int64_t here = plan.keys_padded - key < KEYS ? plan.keys_padded - key : KEYS;
            product(queries, plan.k * size, keys_of(head) + key * plan.k * size,
                    plan.k * LANES * size, plan.k, rows, here / LANES, scores, KEYS, false);
            for (int64_t r = 0; r < rows; r++) {
                const int64_t end = op.causal ? first + r + 1 : plan.keys;
                const int64_t valid = end - key < 0 ? 0 : end - key < here ? end - key : here;
                const float alpha = context.kernels->softmax(
                    {scores + r * KEYS, int(valid), int(here), op.scale * LOG2E, top + r, sum + r,
                     weights + r * KEYS * size, op.a.type});
                if (key && alpha != 1)
                    context.kernels->rescale(sums + r * width, alpha, int(width));
            }
            product(weights, KEYS * size, values_of(head) + key * LANES * size,
                    plan.keys_padded * LANES * size, here, rows, plan.blocks, sums, width, key > 0);
        }
        char *row =
            reinterpret_cast<char *>(top) + round_up(2 * plan.query_rows * sizeof(float), 64);
        const int64_t spare = padded(op.out.c) - op.out.c;
        for (int64_t r = 0; r < rows; r++) {
            context.kernels->scaled(row, op.out.type, sums + r * width, 1 / sum[r], int(width));
            char *out = token(op.out, first + r);
            memcpy(out + head * op.size * size, row, op.size * size);
            if (head + 1 == op.heads) memset(out + op.out.c * size, 0, spare * size);
        }
    }
};

void run(const ft_op &op, const Context &context) {
    const Run run{op, context, make_plan(op, *context.kernels),
                  context.kernels->tile[op.a.type][op.a.type]};
    const int64_t key_blocks = run.plan.keys_padded / LANES, query_blocks = run.plan.query_blocks;
    zero_border(op, context);
    context.pool->each(op.heads * key_blocks,
                       [&](int64_t i, int) { run.pack(i / key_blocks, i % key_blocks); });
    context.pool->each(op.heads * query_blocks, [&](int64_t i, int thread) {
        run.attend(i / query_blocks, i % query_blocks, thread);
    });
}

} // namespace

const Op attention_op = {check, scratch, none, none, run};

} // namespace ft
