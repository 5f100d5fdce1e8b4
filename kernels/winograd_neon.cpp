// The transforms of F(2x2, 3x3) with NEON.
#if defined(__aarch64__)
#include "simd_neon.h"

#include "winograd_vector.h"

const ft::WinogradKernels ft::neon_winograd = winograd_kernels<neon::V>();
#endif
