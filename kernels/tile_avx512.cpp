// Tiles with AVX-512F/BW/VL/DQ: 24 sums in registers, arithmetic in fp32.
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif
#include "simd_avx512.h"

#include "tile_vector.h"

namespace {
using avx512::V;

template <class W> using Kernel = Shapes<V, W, 6, 4>;
template <class A, class W> using Wide = Widened<V, A, W, 6, 4, 640>;

double burn(uint32_t type, int64_t rounds) {
    return type == FT_I8 ? ft::avx2_tiles.burn(type, rounds)
                         : burn_macs<V, WeightF32<V>, 1>(rounds);
}
} // namespace

const ft::Tiles ft::avx512_tiles = {
    {{Kernel<WeightF32<V>>::kernel, Kernel<WeightBf16<V>>::kernel, Kernel<WeightF16<V>>::kernel},
     {{}, Wide<Bf16Activations<V>, WeightBf16<V>>::kernel, {}},
     {{}, {}, Wide<F16Activations<V>, WeightF16<V>>::kernel}},
    {},
    burn,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
