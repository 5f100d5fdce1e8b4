// What is done to rows, with AVX2, FMA and F16C.
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "simd_avx2.h"

#include "rows_vector.h"

const ft::Rows ft::avx2_rows = AllRows<avx2::V>::table;
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
