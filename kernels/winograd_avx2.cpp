// The transforms of F(2x2, 3x3) with AVX2.
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "simd_avx2.h"

#include "winograd_vector.h"

const ft::WinogradKernels ft::avx2_winograd = winograd_kernels<avx2::V>();
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
