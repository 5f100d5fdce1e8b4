// What is done to rows, with NEON.
#if defined(__aarch64__)
#include "simd_neon.h"

#include "rows_vector.h"

const ft::Rows ft::neon_rows = AllRows<neon::V>::table;
#endif
