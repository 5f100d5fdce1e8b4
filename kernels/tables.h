// What each instruction set contributes; isas.cpp joins these into Kernels.
//
// Plain constant data: nothing here may run before the machine is known to have the instructions.
#pragma once
#include "internal.h"

namespace ft {

struct Tiles {
    TileKernel of[3][3]; // as Kernels::tile
    TileKernel narrow;
    double (*burn)(uint32_t type, int64_t rounds);
};

struct Rows { // as the fields of Kernels
    void (*finish)(const Finish &);
    float (*softmax)(const Softmax &);
    void (*rescale)(float *x, float f, int n);
    void (*scaled)(char *out, uint32_t type, const float *acc, float f, int n);
    void (*moments)(const char *x, uint32_t type, int64_t pixel_bytes, int pixels, int channels,
                    const float *shift, float *sum, float *square);
    void (*affine)(char *out, const char *x, uint32_t type, int channels, const float *scale,
                   const float *shift, uint32_t act);
    void (*layer_norm)(char *out, const char *x, uint32_t type, int channels, float eps,
                       const float *gamma, const float *beta);
    void (*unary)(char *out, const char *a, const char *b, uint32_t type, int n, uint32_t act);
    void (*to_int8)(char *pixel, const char *x, uint32_t type, int channels);
    void (*widen)(char *out, uint32_t type, const char *w, uint32_t w_type, int64_t k);
};

extern const Tiles scalar_tiles, avx2_tiles, avx512_tiles, avx512_vnni_tiles, avx512_bf16_tiles,
    amx_tiles, neon_tiles, neon_dot_tiles, neon_bf16_tiles, neon_i8mm_tiles;
extern const Rows scalar_rows, avx2_rows, avx512_rows, avx512_bf16_rows, neon_rows;
extern const WinogradKernels scalar_winograd, avx2_winograd, avx512_winograd, avx512_bf16_winograd,
    neon_winograd;
void amx_enter();

} // namespace ft
