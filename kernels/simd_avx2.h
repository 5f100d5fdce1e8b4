// Sixteen floats at a time with AVX2, FMA and F16C: two vectors of eight.
// Include after the target pragma of the file.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {
namespace avx2 {

inline __m256 bits(__m256i x) { return _mm256_castsi256_ps(x); }
inline __m256i bits(__m256 x) { return _mm256_castps_si256(x); }

struct V {
    struct F {
        __m256 lo, hi;
    };
    static constexpr bool SPLITS = false; // of x into its floor and the rest, at once
    static constexpr float LEAST = -127;  // 2^x is zero from here
    static constexpr int MOMENT_BLOCKS = 2;
    static constexpr int BURN = 6;

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float *p, F x) {
        _mm256_storeu_ps(p, x.lo);
        _mm256_storeu_ps(p + 8, x.hi);
    }
    static F load_bf16(const uint16_t *p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
    static void store_bf16(uint16_t *p, F x) {
        const __m256i packed = _mm256_packus_epi32(narrow_bf16(x.lo), narrow_bf16(x.hi));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_permute4x64_epi64(packed, 0xd8));
    }
    static F keep_bf16(uint16_t *p, F x) { // store; what load would give
        store_bf16(p, x);
        return load_bf16(p);
    }
    static F load_f16(const uint16_t *p) {
        return {_mm256_cvtph_ps(half(p)), _mm256_cvtph_ps(half(p + 8))};
    }
    static void store_f16(uint16_t *p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x.lo, 0));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(p + 8), _mm256_cvtps_ph(x.hi, 0));
    }
    // Pairs of bf16, one after the other in a word: the first and the second of each.
    static F first_bf16(const char *p) {
        const F x = words(p);
        return {bits(_mm256_slli_epi32(bits(x.lo), 16)), bits(_mm256_slli_epi32(bits(x.hi), 16))};
    }
    static F second_bf16(const char *p) {
        const __m256 mask = bits(_mm256_set1_epi32(int(0xffff0000)));
        const F x = words(p);
        return {_mm256_and_ps(x.lo, mask), _mm256_and_ps(x.hi, mask)};
    }
    // The bits of each word that are left by both shifts, as a number with a sign.
    template <int LEFT, int RIGHT> static F field(const char *p) {
        const F x = words(p);
        return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bits(x.lo), LEFT), RIGHT)),
                _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bits(x.hi), LEFT), RIGHT))};
    }
    static void store_int8(char *p, F x) { // whole numbers
        const __m256i wide = _mm256_permute4x64_epi64(
            _mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)), 0xd8);
        _mm_storeu_si128(
            reinterpret_cast<__m128i *>(p),
            _mm_packs_epi16(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
    }
    static void store_pairs(char *p, F first, F second) { // bf16 of both, side by side
        store(reinterpret_cast<float *>(p),
              {pair_bf16(first.lo, second.lo), pair_bf16(first.hi, second.hi)});
    }
    static F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
    static F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
    static F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
    static F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
    static F fma(F a, F b, F c) { // a * b + c
        return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
    }
    static F max(F a, F b) { // b where either is NaN
        return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
    }
    static F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
    static F abs(F a) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
    }
    static F negative(F a, F yes, F no) { // where the sign of a is set
        return {_mm256_blendv_ps(no.lo, yes.lo, a.lo), _mm256_blendv_ps(no.hi, yes.hi, a.hi)};
    }
    static F keep(F a, int n, F rest) { // the first n, 0 < n < 16, of a, then of rest
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256 lo = bits(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
        const __m256 hi = bits(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane));
        return {_mm256_blendv_ps(rest.lo, a.lo, lo), _mm256_blendv_ps(rest.hi, a.hi, hi)};
    }
    static F round(F a) { return {_mm256_round_ps(a.lo, 8), _mm256_round_ps(a.hi, 8)}; }
    static F scale2(F a, F n) { // a * 2^n, n whole, from LEAST to 127
        return {_mm256_mul_ps(a.lo, power(n.lo)), _mm256_mul_ps(a.hi, power(n.hi))};
    }
    static float sum(F a) {
        const __m256 x = _mm256_add_ps(a.lo, a.hi);
        const __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
    }
    static float top(F a) {
        const __m256 x = _mm256_max_ps(a.lo, a.hi);
        const __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const __m128 z = _mm_max_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
    }

  private:
    static __m128i half(const uint16_t *p) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    }
    static F words(const char *p) { return load(reinterpret_cast<const float *>(p)); }
    static __m256 widen_bf16(const uint16_t *p) {
        return bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half(p)), 16));
    }
    static __m256i narrow_bf16(__m256 x) { // round to nearest, ties to even; NaN stays NaN
        const __m256i u = bits(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
        const __m256i nan = bits(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        return _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
    }
    static __m256 pair_bf16(__m256 low, __m256 high) {
        return bits(_mm256_or_si256(narrow_bf16(low), _mm256_slli_epi32(narrow_bf16(high), 16)));
    }
    static __m256 power(__m256 n) { // by its exponent
        const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return bits(_mm256_slli_epi32(e, 23));
    }
};

} // namespace avx2
} // namespace
