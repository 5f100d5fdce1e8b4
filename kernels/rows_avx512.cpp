// What is done to rows, with AVX-512F/BW/VL/DQ.
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif
#include "simd_avx512.h"

#include "rows_vector.h"

const ft::Rows ft::avx512_rows = AllRows<avx512::V>::table;
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
