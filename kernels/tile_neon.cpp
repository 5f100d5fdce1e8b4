// Tiles with NEON: 24 vectors of sums in registers, arithmetic in fp32.
#if defined(__aarch64__)
#include "simd_neon.h"

#include "narrow_vector.h"
#include "tile_vector.h"

namespace {
using neon::V;

template <class W> using Kernel = Shapes<V, W, 6, 1>;
template <class A, class W> using Wide = Widened<V, A, W, 6, 1, 640>;

struct Dot { // pairs of products in 16 bits, two pairs to each half of a sum
    struct I {
        int32x4_t sums[8]; // of outputs in order, two each
    };
    struct W {
        int8x16_t a, b, c, d;
    };
    static constexpr int BURN = 2;
    static int8x16_t load(const char *p) { return vld1q_s8(reinterpret_cast<const int8_t *>(p)); }
    static I start(int32_t) {
        I zero;
        for (int32x4_t &sum : zero.sums) sum = vdupq_n_s32(0);
        return zero;
    }
    static int8x8_t activation(const char *p) { // four, twice
        int32_t x;
        memcpy(&x, p, 4);
        return vreinterpret_s8_s32(vdup_n_s32(x));
    }
    static W weight(const char *p) { return {load(p), load(p + 16), load(p + 32), load(p + 48)}; }
    static I mac(I acc, int8x8_t a, const W &w) {
        const int8x16_t parts[] = {w.a, w.b, w.c, w.d};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            int32x4_t *const sum = acc.sums + 2 * i;
            sum[0] = vpadalq_s16(sum[0], vmull_s8(vget_low_s8(parts[i]), a));
            sum[1] = vpadalq_s16(sum[1], vmull_s8(vget_high_s8(parts[i]), a));
        }
        return acc;
    }
    static float32x4_t four(const int32x4_t *sums) {
        return vcvtq_f32_s32(vpaddq_s32(sums[0], sums[1]));
    }
    static V::F floats(const I &x) {
        return {four(x.sums), four(x.sums + 2), four(x.sums + 4), four(x.sums + 6)};
    }
};

double burn(uint32_t type, int64_t rounds) {
    return type == FT_I8 ? burn_narrow<V, Dot>(rounds) : burn_macs<V, WeightF32<V>, 1>(rounds);
}
} // namespace

const ft::Tiles ft::neon_tiles = {
    {{Kernel<WeightF32<V>>::kernel, Kernel<WeightBf16<V>>::kernel, Kernel<WeightF16<V>>::kernel},
     {{}, Wide<Bf16Activations<V>, WeightBf16<V>>::kernel, {}},
     {{}, {}, Wide<F16Activations<V>, WeightF16<V>>::kernel}},
    Narrow<V, Dot, 2, 1>::kernel,
    burn,
};
#endif
