// Tiles with NEON: 24 vectors of sums in registers, arithmetic in fp32.
#if defined(__aarch64__)
#include "simd_neon.h"

#include "tile_vector.h"

namespace {
using neon::V;

template <class W> using Kernel = Shapes<V, W, 6, 1>;
template <class A, class W> using Wide = Widened<V, A, W, 6, 1, 640>;

double burn(uint32_t, int64_t rounds) { return burn_macs<V, WeightF32<V>, 1>(rounds); }
} // namespace

const ft::Tiles ft::neon_tiles = {
    {{Kernel<WeightF32<V>>::kernel, Kernel<WeightBf16<V>>::kernel, Kernel<WeightF16<V>>::kernel},
     {{}, Wide<Bf16Activations<V>, WeightBf16<V>>::kernel, {}},
     {{}, {}, Wide<F16Activations<V>, WeightF16<V>>::kernel}},
    burn,
};
#endif
