// Tiles with AVX2, FMA and F16C: 12 vectors of sums in registers, arithmetic in fp32.
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "simd_avx2.h"

#include "tile_vector.h"

namespace {
using avx2::V;

template <class W> using Kernel = Shapes<V, W, 6, 1>;
template <class A, class W> using Wide = Widened<V, A, W, 6, 1, 640>;

double burn(uint32_t, int64_t rounds) { return burn_macs<V, WeightF32<V>, 1>(rounds); }
} // namespace

const ft::Tiles ft::avx2_tiles = {
    {{Kernel<WeightF32<V>>::kernel, Kernel<WeightBf16<V>>::kernel, Kernel<WeightF16<V>>::kernel},
     {{}, Wide<Bf16Activations<V>, WeightBf16<V>>::kernel, {}},
     {{}, {}, Wide<F16Activations<V>, WeightF16<V>>::kernel}},
    burn,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
