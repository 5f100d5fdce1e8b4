// The bf16 and int8 tiles with AMX: 32 rows by two blocks of outputs as four matrices of 16 x 16
// sums.
//
// Sixteen pairs (quads) of k of a block of weights are a matrix as they lie, and so are 16 rows of
// activations where they are equally far apart; other rows are gathered for every step over k.
#if defined(__x86_64__)
#include "amx_tile.h"

#include "tables.h"

namespace {

constexpr int SIDE = 16;              // rows of a matrix
constexpr int STEP = 32;              // k of a matrix of bf16; of int8 twice as many
constexpr int ROW = 2 * STEP;         // its bytes in a row, of any matrix
constexpr int SUMS = 0, A = 4, W = 6; // registers: four of sums, two of activations, two of weights

constexpr amx::Config CONFIG = {
    1, 0, {}, {ROW, ROW, ROW, ROW, ROW, ROW, ROW, ROW}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Sixteen rows of the tile, or what is left of them.
struct Half {
    const char *const *rows;
    int count;
    int64_t stride; // 0: not equally far apart
};

Half half(const ft::Tile &t, int first) {
    Half h = {t.rows + first, t.row_count - first < SIDE ? t.row_count - first : SIDE, 0};
    if (h.count < SIDE) return h;
    h.stride = h.rows[1] - h.rows[0];
    for (int r = 2; r < SIDE; r++)
        if (h.rows[r] - h.rows[r - 1] != h.stride) h.stride = 0;
    return h;
}

// Activations from `at` bytes into the rows; zeros beyond `bytes` and where there is no row.
template <int T> void load_activations(const Half &h, int64_t at, int bytes) {
    if (h.stride && bytes == ROW) return amx::load<T>(h.rows[0] + at, h.stride);
    alignas(64) char gathered[SIDE][ROW];
    if (h.count < SIDE || bytes < ROW) memset(gathered, 0, sizeof gathered);
    for (int r = 0; r < h.count; r++)
        if (bytes == ROW)
            memcpy(gathered[r], h.rows[r] + at, ROW);
        else
            memcpy(gathered[r], h.rows[r] + at, size_t(bytes));
    amx::load<T>(gathered, ROW);
}

// A block's weights of the step; zeros beyond `words` of pairs or quads of k.
template <int T> void load_weights(const char *w, int words) {
    if (words == SIDE) return amx::load<T>(w, ROW);
    alignas(64) char filled[SIDE][ROW] = {};
    memcpy(filled, w, size_t(words) * ROW);
    amx::load<T>(filled, ROW);
}

template <int T> void load_sums(const ft::Tile &t, const float *acc, int count) {
    if (!t.add) return amx::zero<T>();
    const int64_t stride = int64_t(t.stride) * 4;
    if (count == SIDE) return amx::load<T>(acc, stride);
    alignas(64) float some[SIDE][SIDE] = {};
    for (int r = 0; r < count; r++) memcpy(some[r], acc + r * int64_t(t.stride), ROW);
    amx::load<T>(some, ROW);
}

template <int T> void store_sums(const ft::Tile &t, float *acc, int count) {
    if (count == SIDE) return amx::store<T>(acc, int64_t(t.stride) * 4);
    alignas(64) float all[SIDE][SIDE];
    amx::store<T>(all, ROW);
    for (int r = 0; r < count; r++) memcpy(acc + r * int64_t(t.stride), all[r], ROW);
}

template <int HALVES, int BLOCKS> void tile(const ft::Tile &t) {
    const Half top = half(t, 0), bottom = HALVES == 2 ? half(t, SIDE) : top;
    float *acc[2] = {t.acc, t.acc + SIDE * int64_t(t.stride)};
    load_sums<SUMS>(t, acc[0], top.count);
    if (BLOCKS == 2) load_sums<SUMS + 1>(t, acc[0] + SIDE, top.count);
    if (HALVES == 2) load_sums<SUMS + 2>(t, acc[1], bottom.count);
    if (HALVES == 2 && BLOCKS == 2) load_sums<SUMS + 3>(t, acc[1] + SIDE, bottom.count);
    const char *w = t.w;
    for (int i = 0; i < t.tap_count; i++)
        for (int k = 0; k < t.k; k += STEP) {
            const int left = t.k - k < STEP ? t.k - k : STEP;
            const int64_t at = t.taps[i] + int64_t(k) * 2;
            load_activations<A>(top, at, left * 2);
            load_weights<W>(w, left / 2);
            amx::dot_bf16<SUMS, A, W>();
            if (BLOCKS == 2) {
                load_weights<W + 1>(w + t.w_block, left / 2);
                amx::dot_bf16<SUMS + 1, A, W + 1>();
            }
            if (HALVES == 2) {
                load_activations<A + 1>(bottom, at, left * 2);
                amx::dot_bf16<SUMS + 2, A + 1, W>();
            }
            if (HALVES == 2 && BLOCKS == 2) amx::dot_bf16<SUMS + 3, A + 1, W + 1>();
            w += int64_t(left) * ft::LANES * 2;
        }
    store_sums<SUMS>(t, acc[0], top.count);
    if (BLOCKS == 2) store_sums<SUMS + 1>(t, acc[0] + SIDE, top.count);
    if (HALVES == 2) store_sums<SUMS + 2>(t, acc[1], bottom.count);
    if (HALVES == 2 && BLOCKS == 2) store_sums<SUMS + 3>(t, acc[1] + SIDE, bottom.count);
}

void run(const ft::Tile &t) {
    if (t.row_count > SIDE)
        t.blocks == 2 ? tile<2, 2>(t) : tile<2, 1>(t);
    else
        t.blocks == 2 ? tile<1, 2>(t) : tile<1, 1>(t);
}

// --- int8: whole sums of a tap, then fp32 with the scales of its pixels -------------------------

template <int T> void add_sums(const ft::Tile &t, int tap, const Half &h, float *acc) {
    alignas(64) int32_t sums[SIDE][SIDE];
    amx::store<T>(sums, ROW);
    for (int r = 0; r < h.count; r++) {
        const float scale = ft::Int8Pixel::of(h.rows[r] + t.taps[tap])->scale;
        float *out = acc + r * int64_t(t.stride);
        for (int n = 0; n < SIDE; n++)
            out[n] = __builtin_fmaf(float(sums[r][n]), scale, t.add || tap ? out[n] : 0);
    }
}

template <int HALVES, int BLOCKS> void narrow_tile(const ft::Tile &t) {
    const Half top = half(t, 0), bottom = HALVES == 2 ? half(t, SIDE) : top;
    float *acc[2] = {t.acc, t.acc + SIDE * int64_t(t.stride)};
    const char *w = t.w;
    for (int i = 0; i < t.tap_count; i++) {
        amx::zero<SUMS>();
        amx::zero<SUMS + 1>();
        amx::zero<SUMS + 2>();
        amx::zero<SUMS + 3>();
        for (int k = 0; k < t.k; k += ROW) {
            const int left = t.k - k < ROW ? t.k - k : ROW;
            const int64_t at = t.taps[i] + k;
            load_activations<A>(top, at, left);
            load_weights<W>(w, left / 4);
            amx::dot_int8<SUMS, A, W>();
            if (BLOCKS == 2) {
                load_weights<W + 1>(w + t.w_block, left / 4);
                amx::dot_int8<SUMS + 1, A, W + 1>();
            }
            if (HALVES == 2) {
                load_activations<A + 1>(bottom, at, left);
                amx::dot_int8<SUMS + 2, A + 1, W>();
            }
            if (HALVES == 2 && BLOCKS == 2) amx::dot_int8<SUMS + 3, A + 1, W + 1>();
            w += int64_t(left) * ft::LANES;
        }
        add_sums<SUMS>(t, i, top, acc[0]);
        if (BLOCKS == 2) add_sums<SUMS + 1>(t, i, top, acc[0] + SIDE);
        if (HALVES == 2) add_sums<SUMS + 2>(t, i, bottom, acc[1]);
        if (HALVES == 2 && BLOCKS == 2) add_sums<SUMS + 3>(t, i, bottom, acc[1] + SIDE);
    }
}

void narrow(const ft::Tile &t) {
    if (t.row_count > SIDE)
        t.blocks == 2 ? narrow_tile<2, 2>(t) : narrow_tile<2, 1>(t);
    else
        t.blocks == 2 ? narrow_tile<1, 2>(t) : narrow_tile<1, 1>(t);
}

// --- the ceiling --------------------------------------------------------------------------------

template <bool INT8, int C, int X, int Y> void dot() {
    if constexpr (INT8)
        amx::dot_int8<C, X, Y>();
    else
        amx::dot_bf16<C, X, Y>();
}

template <bool INT8> double burn_dots(int64_t rounds) {
    ft::amx_enter(); // which zeroes the tiles
    for (int64_t i = 0; i < rounds; i++) {
        dot<INT8, SUMS, A, W>();
        dot<INT8, SUMS + 1, A, W + 1>();
        dot<INT8, SUMS + 2, A + 1, W>();
        dot<INT8, SUMS + 3, A + 1, W + 1>();
    }
    return double(rounds) * 4 * SIDE * SIDE * (INT8 ? 2 : 1) * STEP * 2;
}

double burn(uint32_t type, int64_t rounds) {
    if (type == FT_I8) return burn_dots<true>(rounds);
    return type == FT_BF16 ? burn_dots<false>(rounds) : ft::avx512_tiles.burn(type, rounds);
}

} // namespace

void ft::amx_enter() { amx::configure(CONFIG); }

const ft::Tiles ft::amx_tiles = {
    {{}, {{}, {run, 2 * SIDE, 2, SIDE}, {}}, {}}, {narrow, 2 * SIDE, 2, SIDE}, burn};
#endif
