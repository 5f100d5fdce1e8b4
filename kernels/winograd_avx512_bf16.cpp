// The transforms of F(2x2, 3x3), with AVX-512 and AVX512_BF16.
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c"))),             \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")
#endif
#include "simd_avx512_bf16.h"

#include "winograd_vector.h"

const ft::WinogradKernels ft::avx512_bf16_winograd = winograd_kernels<avx512_bf16::V>();
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
