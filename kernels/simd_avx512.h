// Sixteen floats at a time with AVX-512F/BW/VL/DQ.  Include after the target pragma of the file.
#pragma once
#if defined(__GNUC__) && !defined(__clang__) // gcc 12 takes the intrinsics' own idiom for a mistake
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#include <stdint.h>

namespace {
namespace avx512 {

struct V {
    typedef __m512 F;
    static constexpr bool SPLITS = true;
    static constexpr int MOMENT_BLOCKS = 4;
    static constexpr int BURN = 12;
    static F zero() { return _mm512_setzero_ps(); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static F load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, F x) { _mm512_storeu_ps(p, x); }
    static F load_bf16(const uint16_t *p) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    }
    static void store_bf16(uint16_t *p, F x) { // round to nearest, ties to even; NaN stays NaN
        const __m512i u = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
    }
    static F keep_bf16(uint16_t *p, F x) { // store; what load would give
        store_bf16(p, x);
        return load_bf16(p);
    }
    static F load_f16(const uint16_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    static void store_f16(uint16_t *p, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(x, 0));
    }
    // Pairs of bf16, one after the other in a word: the first and the second of each.
    static F first_bf16(const char *p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
    }
    static F second_bf16(const char *p) {
        return _mm512_castsi512_ps(
            _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))));
    }
    // The bits of each word that are left by both shifts, as a number with a sign.
    template <int LEFT, int RIGHT> static F field(const char *p) {
        return _mm512_cvtepi32_ps(
            _mm512_srai_epi32(_mm512_slli_epi32(_mm512_loadu_si512(p), LEFT), RIGHT));
    }
    static void store_int8(char *p, F x) { // whole numbers
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p),
                         _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
    }
    static void store_pairs(char *p, F first, F second) { // bf16 of both, side by side
        const __m512i high = _mm512_and_si512(nearest_bf16(second), _mm512_set1_epi32(-65536));
        _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(nearest_bf16(first), 16), high));
    }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); } // a * b + c
    static F max(F a, F b) { return _mm512_max_ps(a, b); }           // b where either is NaN
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F negative(F a, F yes, F no) { // where the sign of a is set
        return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(a)), no, yes);
    }
    static F keep(F a, int n, F rest) { // the first n, 0 < n < 16, of a, then of rest
        return _mm512_mask_blend_ps(__mmask16((1u << n) - 1), rest, a);
    }
    static F above_whole(F a) { return _mm512_reduce_ps(a, 9); } // a - floor(a)
    static F scale2(F a, F n) { return _mm512_scalef_ps(a, n); } // a * 2^floor(n)
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    static float top(F a) { return _mm512_reduce_max_ps(a); }

  private:
    static __m512i nearest_bf16(F x) { // in the upper half of a word; not of NaN
        const __m512i u = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        return _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    }
};

} // namespace avx512
} // namespace
