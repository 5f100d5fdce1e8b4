// The tile of int8 by int8 as a template.  Include after the target pragma.
//
// D says how four products are summed into an int32: I, sums of a block of outputs; `start`, what
// they begin with, given the sum of the activations; `mac`.  V is the trait of a simd_*.h.
#pragma once
#include "tables.h"

namespace {

template <class V, class D, int R, int B> void narrow_tile(const ft::Tile &t) {
    typedef typename V::F F;
    const char *w = t.w;
    for (int i = 0; i < t.tap_count; i++) {
        const char *row[R]; // those beyond row_count repeat the first and are not stored
        typename D::I acc[R][B];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            row[r] = t.rows[r < t.row_count ? r : 0] + t.taps[i];
            const auto start = D::start(ft::Int8Pixel::of(row[r])->sum);
#pragma GCC unroll 4
            for (int n = 0; n < B; n++) acc[r][n] = start;
        }
        int64_t k = 0;
        do { // k is not 0: nothing else than the sums of the loop is kept
            decltype(D::weight(w)) b[B];
#pragma GCC unroll 4
            for (int n = 0; n < B; n++) b[n] = D::weight(w + n * t.w_block);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const auto a = D::activation(row[r] + k);
#pragma GCC unroll 4
                for (int n = 0; n < B; n++) acc[r][n] = D::mac(acc[r][n], a, b[n]);
            }
            k += 4, w += 4 * ft::LANES;
        } while (k < t.k);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) // unrolled, or the sums go through memory
            if (r < t.row_count) {
                const F scale = V::set(ft::Int8Pixel::of(row[r])->scale);
                float *const out = t.acc + r * t.stride;
#pragma GCC unroll 4
                for (int n = 0; n < B; n++) {
                    const F before = t.add || i ? V::load(out + n * ft::LANES) : V::zero();
                    V::store(out + n * ft::LANES, V::fma(D::floats(acc[r][n]), scale, before));
                }
            }
    }
}

template <class V, class D, int ROWS, int BLOCKS> struct Narrow {
    template <int R, int B> static void pick(const ft::Tile &t) {
        constexpr int FEWER = R > 2 ? R - 2 : 1;
        if constexpr (R > 1)
            if (t.row_count <= FEWER) return pick<FEWER, B>(t);
        if constexpr (B > 1)
            if (t.blocks < B) return pick<R, B - 1>(t);
        narrow_tile<V, D, R, B>(t);
    }
    static void run(const ft::Tile &t) { pick<ROWS, BLOCKS>(t); }
    static constexpr ft::TileKernel kernel = {run, ROWS, BLOCKS, 4};
};

// Independent multiply-accumulates for the ceiling.
template <class V, class D> double burn_narrow(int64_t rounds) {
    static const char zeros[64] = {};
    const char *p = zeros;
    typename D::I acc[D::BURN];
    for (int j = 0; j < D::BURN; j++) acc[j] = D::start(0);
    for (int64_t i = 0; i < rounds; i++) {
        __asm__ volatile("" : "+r"(p)); // what is multiplied stays unknown
        const auto a = D::activation(p);
#pragma GCC unroll 16
        for (int j = 0; j < D::BURN; j++) {
            __asm__ volatile("" : "+r"(p)); // and no two products are known to be alike
            acc[j] = D::mac(acc[j], a, D::weight(p));
        }
    }
    float sink[D::BURN][ft::LANES];
    for (int j = 0; j < D::BURN; j++) V::store(sink[j], D::floats(acc[j]));
    __asm__ volatile("" : : "r"(sink) : "memory"); // what is summed is used
    return double(rounds) * D::BURN * 4 * ft::LANES * 2;
}

} // namespace
