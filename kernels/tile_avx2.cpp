// Tiles with AVX2, FMA and F16C: 12 vectors of sums in registers, arithmetic in fp32.
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "simd_avx2.h"

#include "narrow_vector.h"
#include "tile_vector.h"

namespace {
using avx2::V;

template <class W> using Kernel = Shapes<V, W, 6, 1>;
template <class A, class W> using Wide = Widened<V, A, W, 6, 1, 640>;

// The instruction takes one side without a sign: the magnitudes of activations, whose signs go to
// the weights.  Pairs of products are at most 2 * 127 * 127 and fit into its 16 bits.
struct Dot {
    typedef int32_t Sums __attribute__((vector_size(32))); // of __m256i, gcc 12 makes copies
    struct I {
        Sums lo, hi;
    };
    struct A {
        __m256i value, magnitude;
    };
    struct W {
        __m256i lo, hi;
    };
    static constexpr int BURN = 4;
    static __m256i load(const char *p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    }
    static I start(int32_t) { return {Sums{}, Sums{}}; }
    static A activation(const char *p) { // four, to every lane
        int32_t x;
        memcpy(&x, p, 4);
        const __m256i four = _mm256_set1_epi32(x);
        return {four, _mm256_abs_epi8(four)};
    }
    static W weight(const char *p) { return {load(p), load(p + 32)}; }
    static Sums products(const A &a, __m256i w) {
        const __m256i pairs = _mm256_maddubs_epi16(a.magnitude, _mm256_sign_epi8(w, a.value));
        return Sums(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static I mac(const I &acc, const A &a, const W &w) {
        return {acc.lo + products(a, w.lo), acc.hi + products(a, w.hi)};
    }
    static V::F floats(const I &x) {
        return {_mm256_cvtepi32_ps(__m256i(x.lo)), _mm256_cvtepi32_ps(__m256i(x.hi))};
    }
};

double burn(uint32_t type, int64_t rounds) {
    return type == FT_I8 ? burn_narrow<V, Dot>(rounds) : burn_macs<V, WeightF32<V>, 1>(rounds);
}
} // namespace

const ft::Tiles ft::avx2_tiles = {
    {{Kernel<WeightF32<V>>::kernel, Kernel<WeightBf16<V>>::kernel, Kernel<WeightF16<V>>::kernel},
     {{}, Wide<Bf16Activations<V>, WeightBf16<V>>::kernel, {}},
     {{}, {}, Wide<F16Activations<V>, WeightF16<V>>::kernel}},
    Narrow<V, Dot, 4, 1>::kernel,
    burn,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
