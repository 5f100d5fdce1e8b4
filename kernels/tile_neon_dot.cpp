// The int8 tile with ARMv8.2's dot products: one instruction adds four products to every sum.
#if defined(__aarch64__)
#if defined(__clang__) && !defined(__ARM_FEATURE_DOTPROD)
// clang knows the instructions only by a flag of the file, which CMakeLists.txt gives.
#include "tables.h"

const ft::Tiles ft::neon_dot_tiles = {};
#else
#if !defined(__clang__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include "simd_neon.h"

#include "narrow_vector.h"

namespace {
using neon::V;

struct Dot {
    struct I {
        int32x4_t a, b, c, d;
    };
    struct W {
        int8x16_t a, b, c, d;
    };
    static constexpr int BURN = 6;
    static int8x16_t load(const char *p) { return vld1q_s8(reinterpret_cast<const int8_t *>(p)); }
    static I start(int32_t) {
        const int32x4_t zero = vdupq_n_s32(0);
        return {zero, zero, zero, zero};
    }
    static int8x16_t activation(const char *p) { // four, to every lane
        int32_t x;
        memcpy(&x, p, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(x));
    }
    static W weight(const char *p) { return {load(p), load(p + 16), load(p + 32), load(p + 48)}; }
    static I mac(const I &acc, int8x16_t a, const W &w) {
        return {vdotq_s32(acc.a, a, w.a), vdotq_s32(acc.b, a, w.b), vdotq_s32(acc.c, a, w.c),
                vdotq_s32(acc.d, a, w.d)};
    }
    static V::F floats(const I &x) {
        return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b), vcvtq_f32_s32(x.c), vcvtq_f32_s32(x.d)};
    }
};

double burn(uint32_t type, int64_t rounds) {
    return type == FT_I8 ? burn_narrow<V, Dot>(rounds) : ft::neon_tiles.burn(type, rounds);
}
} // namespace

const ft::Tiles ft::neon_dot_tiles = {{}, Narrow<V, Dot, 6, 1>::kernel, burn};
#endif
#endif
