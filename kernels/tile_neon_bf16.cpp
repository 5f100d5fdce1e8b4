// The bf16 tile with ARMv8.6's dot products: pairs are summed in fp32 by one instruction.
#if defined(__aarch64__)
#if defined(__clang__) && !defined(__ARM_FEATURE_BF16)
// clang knows the instructions only by a flag of the file, which CMakeLists.txt gives.
#include "tables.h"

const ft::Tiles ft::neon_bf16_tiles = {};
#else
#if !defined(__clang__)
#pragma GCC target("arch=armv8.2-a+bf16")
#endif
#include "simd_neon.h"

#include "tile_vector.h"

namespace {
using neon::V;

struct DotBf16 {
    static constexpr int STEP = 2, PARTS = 1, A_BYTES = 2, BYTES = 64;
    struct Pairs {
        bfloat16x8_t a, b, c, d;
    };
    static bfloat16x8_t load(const char *p) {
        return vreinterpretq_bf16_u16(vld1q_u16(reinterpret_cast<const uint16_t *>(p)));
    }
    static bfloat16x8_t activation(const char *p) { // a pair, to every lane
        uint32_t x;
        memcpy(&x, p, 4);
        return vreinterpretq_bf16_u32(vdupq_n_u32(x));
    }
    template <int> static Pairs weight(const char *p) {
        return {load(p), load(p + 16), load(p + 32), load(p + 48)};
    }
    static V::F mac(V::F acc, bfloat16x8_t a, const Pairs &w) {
        return {vbfdotq_f32(acc.a, a, w.a), vbfdotq_f32(acc.b, a, w.b), vbfdotq_f32(acc.c, a, w.c),
                vbfdotq_f32(acc.d, a, w.d)};
    }
};

double burn(uint32_t type, int64_t rounds) {
    if (type != FT_BF16) return ft::neon_dot_tiles.burn(type, rounds);
    return burn_macs<V, DotBf16, 2>(rounds);
}
} // namespace

const ft::Tiles ft::neon_bf16_tiles = {
    {{}, {{}, Shapes<V, DotBf16, 6, 1>::kernel, {}}, {}}, {}, burn};
#endif
#endif
