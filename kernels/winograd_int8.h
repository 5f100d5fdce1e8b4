// Weights of int8 for F(2x2, 3x3) of int8: whole numbers all the way, in loops that compilers
// vectorize.  Include after the target pragma of the file.
#pragma once
#include "tables.h"

namespace {

constexpr int LINE = 4 * ft::LANES; // weights: four inputs of a block of outputs

// f(position, value) of 4 G g G^T, which is whole and at most 9 * 127, of one weight's nine taps.
template <class F> __attribute__((always_inline)) inline void
four_times(const char *w, int64_t tap_bytes, const F &f) {
    int16_t t[4][3]; // 2 G g
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) {
        const int16_t a = int8_t(w[j * tap_bytes]), b = int8_t(w[(3 + j) * tap_bytes]),
                      c = int8_t(w[(6 + j) * tap_bytes]);
        t[0][j] = int16_t(a + a);
        t[1][j] = int16_t(a + c + b);
        t[2][j] = int16_t(a + c - b);
        t[3][j] = int16_t(c + c);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const int16_t ends = int16_t(t[i][0] + t[i][2]);
        f(4 * i, int16_t(t[i][0] + t[i][0]));
        f(4 * i + 1, int16_t(ends + t[i][1]));
        f(4 * i + 2, int16_t(ends - t[i][1]));
        f(4 * i + 3, int16_t(t[i][2] + t[i][2]));
    }
}

// Each output has one scale for all positions: 2^15 / (4 * factor), its factor such that the
// largest becomes 127.
inline void winograd_weights_int8(char *u, int64_t position_bytes, float *scales, const char *w,
                                  int64_t tap_bytes, int64_t k) {
    const int64_t lines = k / 4;
    int16_t top[LINE] = {};
    for (int64_t line = 0; line < lines; line++)
        for (int e = 0; e < LINE; e++) {
            int16_t most = top[e];
            four_times(w + line * LINE + e, tap_bytes, [&](int, int16_t x) {
                const int16_t size = int16_t(x < 0 ? -x : x);
                most = most < size ? size : most;
            });
            top[e] = most;
        }
    int16_t factor[LINE];
    for (int n = 0; n < ft::LANES; n++) {
        int32_t most = 127; // factors are below 1, in 15 bits
        for (int i = 0; i < 4; i++) most = most < top[4 * n + i] ? top[4 * n + i] : most;
        const int32_t part = most > 127 ? 127 * 32768 / most : 32767;
        for (int i = 0; i < 4; i++) factor[4 * n + i] = int16_t(part);
        scales[n] = most > 127 ? 8192.0f / float(part) : 0.25f;
    }
    int8_t made[16][LINE]; // of the positions, which to a compiler might overlap
    for (int64_t line = 0; line < lines; line++) {
        for (int e = 0; e < LINE; e++)
            four_times(w + line * LINE + e, tap_bytes, [&](int p, int16_t x) {
                const int16_t eighths = int16_t(int16_t(16 * x) * int32_t(factor[e]) >> 16);
                made[p][e] = int8_t(int16_t(eighths + 4) >> 3);
            });
        for (int p = 0; p < 16; p++) memcpy(u + p * position_bytes + line * LINE, made[p], LINE);
    }
}

} // namespace
