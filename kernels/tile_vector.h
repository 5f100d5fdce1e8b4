// The tile as a template over vectors of LANES floats.  Include after the target pragma.
//
// W says how a step over k is multiplied: W::STEP elements of k, W::BYTES of a block of weights, in
// W::PARTS parts that need the same registers.
#pragma once
#include "tables.h"

namespace {

// --- weights, multiplied in fp32
// ------------------------------------------------------------------

template <class V> struct InFloat { // an activation is one float
    typedef typename V::F F;
    static constexpr int A_BYTES = 4;
    static F activation(const char *p) {
        float x;
        memcpy(&x, p, 4);
        return V::set(x);
    }
    static F mac(F acc, F a, F w) { return V::fma(a, w, acc); }
};

template <class V> struct WeightF32 : InFloat<V> {
    static constexpr int STEP = 1, PARTS = 1, BYTES = 64;
    template <int> static typename V::F weight(const char *p) {
        return V::load(reinterpret_cast<const float *>(p));
    }
};

template <class V> struct WeightF16 : InFloat<V> {
    static constexpr int STEP = 1, PARTS = 1, BYTES = 32;
    template <int> static typename V::F weight(const char *p) {
        return V::load_f16(reinterpret_cast<const uint16_t *>(p));
    }
};

template <class V> struct WeightBf16 : InFloat<V> { // pairs of k, one after the other
    static constexpr int STEP = 2, PARTS = 2, BYTES = 64;
    template <int PART> static typename V::F weight(const char *p) {
        return PART ? V::second_bf16(p) : V::first_bf16(p);
    }
};

// --- the tile
// -------------------------------------------------------------------------------------

template <class V, class W, int PART, int R, int B>
__attribute__((always_inline)) inline void part(typename V::F (&acc)[R][B],
                                                const char *const (&row)[R], int64_t at,
                                                const char *w, int64_t w_block) {
    decltype(W::template weight<PART>(w)) b[B];
#pragma GCC unroll 4
    for (int n = 0; n < B; n++) b[n] = W::template weight<PART>(w + n * w_block);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        const auto a = W::activation(row[r] + at + PART * W::A_BYTES);
#pragma GCC unroll 4
        for (int n = 0; n < B; n++) acc[r][n] = W::mac(acc[r][n], a, b[n]);
    }
}

template <class V, class W, int R, int B>
__attribute__((always_inline)) inline void step(typename V::F (&acc)[R][B],
                                                const char *const (&row)[R], int64_t at,
                                                const char *w, int64_t w_block) {
    part<V, W, 0, R, B>(acc, row, at, w, w_block);
    if constexpr (W::PARTS == 2) part<V, W, 1, R, B>(acc, row, at, w, w_block);
}

template <class V, class W, int R, int B> void tile(const ft::Tile &t) {
    typename V::F acc[R][B];
    const char *rows[R]; // those beyond row_count repeat the first and are not stored
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        rows[r] = t.rows[r < t.row_count ? r : 0];
#pragma GCC unroll 4
        for (int n = 0; n < B; n++)
            acc[r][n] = t.add && r < t.row_count ? V::load(t.acc + r * t.stride + n * ft::LANES)
                                                 : V::zero();
    }
    const char *w = t.w;
    for (int i = 0; i < t.tap_count; i++) {
        const char *row[R];
        for (int r = 0; r < R; r++) row[r] = rows[r] + t.taps[i];
        for (int64_t k = 0; k < t.k; k += W::STEP, w += W::BYTES)
            step<V, W, R, B>(acc, row, k * W::A_BYTES, w, t.w_block);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) // unrolled, or the sums go through memory once more
        if (r < t.row_count)
#pragma GCC unroll 4
            for (int n = 0; n < B; n++) V::store(t.acc + r * t.stride + n * ft::LANES, acc[r][n]);
}

// Tiles of up to ROWS x BLOCKS: every number of blocks, every second number of rows.
template <class V, class W, int ROWS, int BLOCKS> struct Shapes {
    template <int R, int B> static void pick(const ft::Tile &t) {
        constexpr int FEWER = R > 2 ? R - 2 : 1;
        if constexpr (R > 1)
            if (t.row_count <= FEWER) return pick<FEWER, B>(t);
        if constexpr (B > 1)
            if (t.blocks < B) return pick<R, B - 1>(t);
        tile<V, W, R, B>(t);
    }
    static void run(const ft::Tile &t) { pick<ROWS, BLOCKS>(t); }
    static constexpr ft::TileKernel kernel = {run, ROWS, BLOCKS, 2};
};

// --- activations of half the width
// ----------------------------------------------------------------

template <class V> struct Bf16Activations {
    static typename V::F load(const char *p) {
        return V::load_bf16(reinterpret_cast<const uint16_t *>(p));
    }
};

template <class V> struct F16Activations {
    static typename V::F load(const char *p) {
        return V::load_f16(reinterpret_cast<const uint16_t *>(p));
    }
};

template <class V, class A> void widen(float *out, const char *row, int count) {
    int i = 0;
    for (; i + ft::LANES <= count; i += ft::LANES) V::store(out + i, A::load(row + 2 * i));
    if (i == count) return;
    char last[2 * ft::LANES] = {}; // not to read beyond the row
    memcpy(last, row + 2 * i, size_t(count - i) * 2);
    V::store(out + i, A::load(last));
}

// The tile of W, of rows that are made fp32 first: once for all blocks, up to CHUNK of k at a time.
template <class V, class A, class W, int ROWS, int BLOCKS, int CHUNK> struct Widened {
    // `taps` of them from `tap`, and of each `count` of k from `k`; in a row they lie side by side
    static void chunk(const ft::Tile &t, int tap, int taps, int k, int count) {
        alignas(64) float wide[ROWS][CHUNK + ft::LANES];
        const char *rows[ROWS];
        for (int r = 0; r < t.row_count; r++) {
            rows[r] = reinterpret_cast<const char *>(wide[r]);
            for (int i = 0; i < taps; i++)
                widen<V, A>(wide[r] + i * count, t.rows[r] + t.taps[tap + i] + int64_t(k) * 2,
                            count);
        }
        const int64_t none = 0;
        const char *w = t.w + (int64_t(tap) * t.k + k) / W::STEP * W::BYTES;
        for (int b = 0; b < t.blocks; b += BLOCKS)
            Shapes<V, W, ROWS, BLOCKS>::run({rows, &none, 1, taps * count, w + b * t.w_block,
                                             t.w_block, t.row_count,
                                             t.blocks - b < BLOCKS ? t.blocks - b : BLOCKS,
                                             t.add || tap || k, t.stride, t.acc + b * ft::LANES});
    }

    static void run(const ft::Tile &t) {
        const int pieces = (t.k + CHUNK - 1) / CHUNK; // of a tap, alike
        const int piece = (t.k + pieces * ft::LANES - 1) / (pieces * ft::LANES) * ft::LANES;
        const int taps = pieces > 1 ? 1 : CHUNK / t.k;
        for (int i = 0; i < t.tap_count; i += taps)
            for (int k = 0; k < t.k; k += piece)
                chunk(t, i, t.tap_count - i < taps ? t.tap_count - i : taps, k,
                      t.k - k < piece ? t.k - k : piece);
    }

    static constexpr ft::TileKernel kernel = {run, ROWS, ft::MAX_BLOCKS, 2};
};

// --- the ceiling
// ----------------------------------------------------------------------------------

// Independent multiply-accumulates for the ceiling, each of WIDTH products.
template <class V, class W, int WIDTH> double burn_macs(int64_t rounds) {
    static const char zeros[64] = {};
    const char *p = zeros;
    typename V::F acc[V::BURN];
    for (int j = 0; j < V::BURN; j++) acc[j] = V::zero();
    for (int64_t i = 0; i < rounds; i++) {
        __asm__ volatile("" : "+r"(p)); // what is multiplied stays unknown
        const auto a = W::activation(p);
        const auto w = W::template weight<0>(p);
#pragma GCC unroll 16
        for (int j = 0; j < V::BURN; j++) acc[j] = W::mac(acc[j], a, w);
    }
    float sink[V::BURN][ft::LANES];
    for (int j = 0; j < V::BURN; j++) V::store(sink[j], acc[j]);
    __asm__ volatile("" : : "r"(sink) : "memory"); // what is summed is used
    return double(rounds) * V::BURN * WIDTH * ft::LANES * 2;
}

} // namespace
