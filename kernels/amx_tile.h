// The instructions of AMX on tiles of 16 rows of 64 bytes, or with FERROTYPE_EMULATE_AMX plain code
// that does the same, to test what is built on them where there is no such machine.
//
// Compilers' own intrinsics do not tell that memory is read and written; these do.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {
namespace amx {

struct alignas(64) Config { // as LDTILECFG reads it
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

#ifndef FERROTYPE_EMULATE_AMX

inline void configure(const Config &config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }

template <int T> inline void zero() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(T)); }

template <int T> inline void load(const void *p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}

template <int T> inline void store(void *p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}

// C += A B, pairs of bf16 along A's rows and down B's columns
template <int C, int A, int B> inline void dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// The same of four int8 into an int32
template <int C, int A, int B> inline void dot_int8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else

struct Tiles {
    Config config;
    uint8_t bytes[8][16][64];
};
thread_local Tiles state;

inline void configure(const Config &config) {
    memset(&state, 0, sizeof state);
    state.config = config;
}

template <int T> void zero() { memset(state.bytes[T], 0, sizeof state.bytes[T]); }

template <int T> void load(const void *p, int64_t stride) {
    zero<T>();
    for (int r = 0; r < state.config.rows[T]; r++)
        memcpy(state.bytes[T][r], static_cast<const char *>(p) + r * stride,
               state.config.row_bytes[T]);
}

template <int T> void store(void *p, int64_t stride) {
    for (int r = 0; r < state.config.rows[T]; r++)
        memcpy(static_cast<char *>(p) + r * stride, state.bytes[T][r], state.config.row_bytes[T]);
}

inline float bf16(int tile, int row, int i) {
    uint16_t h;
    memcpy(&h, state.bytes[tile][row] + 2 * i, 2);
    const uint32_t u = uint32_t(h) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

template <int C, int A, int B> void dot_bf16() {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum;
            memcpy(&sum, state.bytes[C][m] + 4 * n, 4);
            for (int k = 0; k < 32; k++) sum += bf16(A, m, k) * bf16(B, k / 2, 2 * n + k % 2);
            memcpy(state.bytes[C][m] + 4 * n, &sum, 4);
        }
}

template <int C, int A, int B> void dot_int8() {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t sum;
            memcpy(&sum, state.bytes[C][m] + 4 * n, 4);
            for (int k = 0; k < 64; k++)
                sum += int8_t(state.bytes[A][m][k]) * int8_t(state.bytes[B][k / 4][4 * n + k % 4]);
            memcpy(state.bytes[C][m] + 4 * n, &sum, 4);
        }
}

#endif

} // namespace amx
} // namespace
