// The int8 tile with AVX512_VNNI: one instruction adds four products to every sum.
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c"))),             \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")
#endif
#include "simd_avx512.h"

#include "narrow_vector.h"

namespace {
using avx512::V;

// The instruction takes one side without a sign: that are weights plus 128, and sums start at
// minus 128 times those of the activations.
struct Dot {
    typedef int32_t I __attribute__((vector_size(64))); // of __m512i, gcc 12 makes copies
    static constexpr int BURN = 12;
    static I start(int32_t sum) { // a program made to harm has any sum: it wraps
        return I(_mm512_set1_epi32(int32_t(0u - 128u * uint32_t(sum))));
    }
    static __m512i activation(const char *p) { // four, to every lane
        int32_t x;
        memcpy(&x, p, 4);
        return _mm512_set1_epi32(x);
    }
    static __m512i weight(const char *p) {
        return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
    }
    static I mac(I acc, __m512i a, __m512i w) { return I(_mm512_dpbusd_epi32(__m512i(acc), w, a)); }
    static V::F floats(I x) { return _mm512_cvtepi32_ps(__m512i(x)); }
};

double burn(uint32_t type, int64_t rounds) {
    return type == FT_I8 ? burn_narrow<V, Dot>(rounds) : ft::avx512_tiles.burn(type, rounds);
}
} // namespace

const ft::Tiles ft::avx512_vnni_tiles = {{}, Narrow<V, Dot, 6, 4>::kernel, burn};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
