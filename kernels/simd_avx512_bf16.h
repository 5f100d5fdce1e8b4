// AVX-512 that rounds to bf16 with one instruction; numbers below 2^-126 become zero.
#pragma once
#include "simd_avx512.h"

namespace {
namespace avx512_bf16 {

struct V : avx512::V {
    static __m256i narrow(F x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
    static void store_bf16(uint16_t *p, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), narrow(x));
    }
    static F keep_bf16(uint16_t *p, F x) {
        const __m256i half = narrow(x);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), half);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
};

} // namespace avx512_bf16
} // namespace
