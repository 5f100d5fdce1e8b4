// What is done to rows, with AVX2, FMA and F16C.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#endif
#include "simd_avx2.h"

#include "rows_vector.h"

const ft::Rows ft::avx2_rows = AllRows<avx2::V>::table;
#endif
