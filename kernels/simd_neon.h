// Sixteen floats at a time with NEON (ARMv8): four vectors of four.
#pragma once
#include <arm_neon.h>
#include <stdint.h>

namespace {
namespace neon {

struct V {
    struct F {
        float32x4_t a, b, c, d;
    };
    static constexpr bool SPLITS = false; // of x into its floor and the rest, at once
    static constexpr float LEAST = -127;  // 2^x is zero from here
    static constexpr int MOMENT_BLOCKS = 2;
    static constexpr int BURN = 6;

    static F zero() { return set(0); }
    static F set(float x) {
        const float32x4_t v = vdupq_n_f32(x);
        return {v, v, v, v};
    }
    static F load(const float *p) {
        return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
    }
    static void store(float *p, F x) {
        vst1q_f32(p, x.a);
        vst1q_f32(p + 4, x.b);
        vst1q_f32(p + 8, x.c);
        vst1q_f32(p + 12, x.d);
    }
    static F load_bf16(const uint16_t *p) {
        return {widen_bf16(p), widen_bf16(p + 4), widen_bf16(p + 8), widen_bf16(p + 12)};
    }
    static void store_bf16(uint16_t *p, F x) {
        vst1q_u16(p, vcombine_u16(narrow_bf16(x.a), narrow_bf16(x.b)));
        vst1q_u16(p + 8, vcombine_u16(narrow_bf16(x.c), narrow_bf16(x.d)));
    }
    static F keep_bf16(uint16_t *p, F x) { // store; what load would give
        store_bf16(p, x);
        return load_bf16(p);
    }
    static F load_f16(const uint16_t *p) {
        return {widen_f16(p), widen_f16(p + 4), widen_f16(p + 8), widen_f16(p + 12)};
    }
    static void store_f16(uint16_t *p, F x) {
        vst1q_u16(p, vcombine_u16(narrow_f16(x.a), narrow_f16(x.b)));
        vst1q_u16(p + 8, vcombine_u16(narrow_f16(x.c), narrow_f16(x.d)));
    }
    // Pairs of bf16, one after the other in a word: the first and the second of each.
    static F first_bf16(const char *p) {
        return map([](float32x4_t x) { return bits(vshlq_n_u32(bits(x), 16)); }, words(p));
    }
    static F second_bf16(const char *p) {
        return map([](float32x4_t x) { return bits(vandq_u32(bits(x), vdupq_n_u32(0xffff0000))); },
                   words(p));
    }
    // The bits of each word that are left by both shifts, as a number with a sign.
    template <int LEFT, int RIGHT> static F field(const char *p) {
        return map(
            [](float32x4_t x) {
                const int32x4_t up = vshlq_n_s32(vreinterpretq_s32_f32(x), LEFT);
                return vcvtq_f32_s32(vshrq_n_s32(up, RIGHT));
            },
            words(p));
    }
    static void store_int8(char *p, F x) { // whole numbers
        const auto half = [](float32x4_t lo, float32x4_t hi) {
            return vqmovn_s16(
                vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(lo)), vqmovn_s32(vcvtnq_s32_f32(hi))));
        };
        vst1q_s8(reinterpret_cast<int8_t *>(p), vcombine_s8(half(x.a, x.b), half(x.c, x.d)));
    }
    static void store_pairs(char *p, F first, F second) { // bf16 of both, side by side
        const auto put = [](char *to, float32x4_t a, float32x4_t b) {
            const uint16x4x2_t both = vzip_u16(narrow_bf16(a), narrow_bf16(b));
            vst1q_u16(reinterpret_cast<uint16_t *>(to), vcombine_u16(both.val[0], both.val[1]));
        };
        put(p, first.a, second.a);
        put(p + 16, first.b, second.b);
        put(p + 32, first.c, second.c);
        put(p + 48, first.d, second.d);
    }
    static F add(F x, F y) { return map(vaddq, x, y); }
    static F sub(F x, F y) { return map(vsubq, x, y); }
    static F mul(F x, F y) { return map(vmulq, x, y); }
    static F div(F x, F y) { return map(vdivq, x, y); }
    static F fma(F x, F y, F z) { // x * y + z
        return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c),
                vfmaq_f32(z.d, x.d, y.d)};
    }
    static F max(F x, F y) { return map(vmaxq, x, y); } // NaN where either is
    static F min(F x, F y) { return map(vminq, x, y); }
    static F abs(F x) {
        return map([](float32x4_t v) { return vabsq_f32(v); }, x);
    }
    static F negative(F x, F yes, F no) { // where the sign of x is set
        return {pick(x.a, yes.a, no.a), pick(x.b, yes.b, no.b), pick(x.c, yes.c, no.c),
                pick(x.d, yes.d, no.d)};
    }
    static F keep(F x, int n, F rest) { // the first n, 0 < n < 16, of x, then of rest
        return {first(x.a, n, rest.a), first(x.b, n - 4, rest.b), first(x.c, n - 8, rest.c),
                first(x.d, n - 12, rest.d)};
    }
    static F round(F x) {
        return map([](float32x4_t v) { return vrndnq_f32(v); }, x);
    }
    static F scale2(F x, F n) { // x * 2^n, n whole, from LEAST to 127
        return mul(x, map([](float32x4_t v) { return power(v); }, n));
    }
    static float sum(F x) {
        return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.b), vaddq_f32(x.c, x.d)));
    }
    static float top(F x) {
        return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.a, x.b), vmaxq_f32(x.c, x.d)));
    }

  private:
    template <class Do> static F map(const Do &one, F x) {
        return {one(x.a), one(x.b), one(x.c), one(x.d)};
    }
    template <class Do> static F map(const Do &one, F x, F y) {
        return {one(x.a, y.a), one(x.b, y.b), one(x.c, y.c), one(x.d, y.d)};
    }
    static float32x4_t vaddq(float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); }
    static float32x4_t vsubq(float32x4_t x, float32x4_t y) { return vsubq_f32(x, y); }
    static float32x4_t vmulq(float32x4_t x, float32x4_t y) { return vmulq_f32(x, y); }
    static float32x4_t vdivq(float32x4_t x, float32x4_t y) { return vdivq_f32(x, y); }
    static float32x4_t vmaxq(float32x4_t x, float32x4_t y) { return vmaxq_f32(x, y); }
    static float32x4_t vminq(float32x4_t x, float32x4_t y) { return vminq_f32(x, y); }

    static float32x4_t bits(uint32x4_t x) { return vreinterpretq_f32_u32(x); }
    static uint32x4_t bits(float32x4_t x) { return vreinterpretq_u32_f32(x); }
    static F words(const char *p) { return load(reinterpret_cast<const float *>(p)); }
    static float32x4_t widen_bf16(const uint16_t *p) { return bits(vshll_n_u16(vld1_u16(p), 16)); }
    static uint16x4_t narrow_bf16(float32x4_t x) { // to nearest, ties to even; NaN stays NaN
        const uint32x4_t u = bits(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
        const uint32x4_t r = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
        return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), r, quiet), 16);
    }
    static float32x4_t widen_f16(const uint16_t *p) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
    }
    static uint16x4_t narrow_f16(float32x4_t x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
    static float32x4_t pick(float32x4_t x, float32x4_t yes, float32x4_t no) {
        return vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(x)), yes, no);
    }
    static float32x4_t first(float32x4_t x, int n, float32x4_t rest) {
        static constexpr int32_t lane[4] = {0, 1, 2, 3};
        return vbslq_f32(vcgtq_s32(vdupq_n_s32(n), vld1q_s32(lane)), x, rest);
    }
    static float32x4_t power(float32x4_t n) { // by its exponent
        const int32x4_t e = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
        return vreinterpretq_f32_s32(vshlq_n_s32(e, 23));
    }
};

} // namespace neon
} // namespace
