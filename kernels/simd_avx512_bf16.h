// AVX-512 that rounds to bf16 with one instruction; numbers below 2^-126 become zero.
#pragma once
#include "simd_avx512.h"

namespace {
namespace avx512_bf16 {

struct V : avx512::V {
    static void store_bf16(uint16_t *p, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    }
};

} // namespace avx512_bf16
} // namespace
