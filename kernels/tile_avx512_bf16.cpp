// The bf16 tile with AVX512_BF16: pairs of products are summed in fp32 by one instruction.
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c"))),             \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")
#endif
#include "simd_avx512.h"

#include "tile_vector.h"

namespace {
using avx512::V;

struct DotBf16 {
    static constexpr int STEP = 2, PARTS = 1, A_BYTES = 2, BYTES = 64;
    static __m512i activation(const char *p) { // a pair, to every lane
        int32_t x;
        memcpy(&x, p, 4);
        return _mm512_set1_epi32(x);
    }
    template <int> static __m512i weight(const char *p) { return _mm512_loadu_si512(p); }
    static __m512 mac(__m512 acc, __m512i a, __m512i w) {
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(w));
    }
};

double burn(uint32_t type, int64_t rounds) {
    if (type != FT_BF16) return ft::avx512_vnni_tiles.burn(type, rounds);
    return burn_macs<V, DotBf16, 2>(rounds);
}
} // namespace

const ft::Tiles ft::avx512_bf16_tiles = {
    {{}, {{}, Shapes<V, DotBf16, 6, 4>::kernel, {}}, {}}, {}, burn};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
