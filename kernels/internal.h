// What the files of the engine share: the tables of kernels, the pool of threads, views of tensors.
#pragma once
#include <stdint.h>
#include <string.h>

#include "ferrotype.h"

namespace ft {

constexpr int LANES = FT_LANES;
constexpr int MAX_ROWS = 32;  // of a tile of any instruction set
constexpr int MAX_BLOCKS = 4; // of LANES outputs, side by side in a tile
constexpr int TILE = MAX_BLOCKS * LANES;

// --- kernels: one struct per instruction set, of function pointers ------------------------------

// acc[r * stride + n] (+)= sum over taps and k of row[r][tap + k] * w[n][tap][k].
struct Tile {
    const char *const *rows; // of pixels of A, one per row of the tile
    const int64_t *taps;     // bytes from a row to where each tap starts
    int32_t tap_count;
    int32_t k;         // elements per tap, a multiple of the kernel's k_step
    const char *w;     // the first block: [tap][k / 2][16][2] for bf16, [tap][k][16] for the others
    int64_t w_block;   // bytes from a block of 16 outputs to the next
    int32_t row_count; // 1 .. rows of the kernel
    int32_t blocks;    // 1 .. blocks of the kernel
    int32_t add;       // to what acc holds
    int32_t stride;    // floats from a row of acc to the next, a multiple of LANES
    float *acc;
};
typedef void tile_fn(const Tile &);

// What lies before the int8 values of a pixel, which are them times `scale`; `sum` is theirs.
// Tile::rows and taps of int8 by int8 lead to the values; acc is in units of the weights' scales,
// and (+)= scale * sum over k, tap by tap, each one fused multiply-add.
struct Int8Pixel {
    float scale;
    int32_t sum;
    int32_t unused[2]; // values start at a multiple of 16
    static const Int8Pixel *of(const char *values) {
        return reinterpret_cast<const Int8Pixel *>(values) - 1;
    }
};

struct TileKernel {
    tile_fn *run; // null: not made for these types
    int rows, blocks;
    int k_step; // 2 for vectors (pairs of bf16), 16 for matrix units
};

// Rows of a tile after the sum, TILE floats apart: out = act(acc * scale + bias + add) + residual.
struct Finish {
    const float *acc;
    const float *scale;          // acc is times these; null: none
    const float *bias, *add;     // null: none
    const char *const *residual; // of each row; null: none; of the type of out
    char *const *out;            // of each row
    int rows;
    int blocks; // of LANES outputs; with geglu, of the result
    uint32_t type, act;
    int32_t geglu, late;
};

// A row of scores becomes weights of the values, and the running maximum and sum are renewed.
struct Softmax {
    float *scores; // `padded` of them, the first `valid` count
    int valid, padded;
    float scale;      // of the scores, times log2(e)
    float *top, *sum; // of this row so far
    char *out;        // `padded` weights; zero from `valid` on
    uint32_t type;    // FT_I8: an Int8Pixel before them, whose scale is for the sums so far
};

// F(2x2, 3x3), Lavin & Gray 2016: 16 products give the 2x2 outputs that take 36 directly.
struct WinogradKernels {
    // One tile: the 4x4 pixels at `x` become 16 rows of channels, position_bytes apart.
    void (*input)(char *v, int64_t position_bytes, const char *x, int64_t row_bytes,
                  int64_t pixel_bytes, uint32_t type, int channels);
    // Nine taps of n weights, tap_bytes apart, become 16 of n, position_bytes apart.
    void (*weights)(char *u, int64_t position_bytes, uint32_t type, const char *w,
                    int64_t tap_bytes, uint32_t w_type, int64_t n);
    // Nine taps of a block's int8 weights, k inputs each, become 16 of int8; sums are to be times
    // `scales` of each output.
    void (*weights_int8)(char *u, int64_t position_bytes, float *scales, const char *w,
                         int64_t tap_bytes, int64_t k);
    // 16 rows of n sums, position floats apart, become those of 2x2 pixels, TILE floats apart.
    void (*output)(float *out, const float *sums, int64_t position, int n);
};

struct Kernels {
    TileKernel tile[3][3]; // by type of activations, type of weights (FT_F32, FT_BF16, FT_F16)
    TileKernel narrow;     // int8 by int8
    // A pixel as int8 values and what is before them; channels a multiple of LANES.
    void (*to_int8)(char *pixel, const char *x, uint32_t type, int channels);
    // k inputs, a multiple of LANES, by LANES outputs of FT_I8 or FT_I4 as weights of `type`;
    // those of FT_I8 without their scales.
    void (*widen)(char *out, uint32_t type, const char *w, uint32_t w_type, int64_t k);
    void (*finish)(const Finish &);
    float (*softmax)(const Softmax &); // returns what earlier sums are multiplied by
    // x[i] *= f
    void (*rescale)(float *x, float f, int n);
    // out[i] = acc[i] * f, n a multiple of LANES
    void (*scaled)(char *out, uint32_t type, const float *acc, float f, int n);
    // sum[c] += x - shift[c], square[c] += (x - shift[c])^2, over pixels
    void (*moments)(const char *x, uint32_t type, int64_t pixel_bytes, int pixels, int channels,
                    const float *shift, float *sum, float *square);
    // out = act(x * scale + shift), by channel
    void (*affine)(char *out, const char *x, uint32_t type, int channels, const float *scale,
                   const float *shift, uint32_t act);
    // one pixel: out = (x - mean) / sqrt(variance + eps) * gamma + beta; channels need not fill
    // LANES
    void (*layer_norm)(char *out, const char *x, uint32_t type, int channels, float eps,
                       const float *gamma, const float *beta);
    // out = act(a + b), b may be null; n a multiple of LANES
    void (*unary)(char *out, const char *a, const char *b, uint32_t type, int n, uint32_t act);
    // multiply-accumulates without memory: the number of FLOP done
    double (*burn)(uint32_t type, int64_t rounds);
    WinogradKernels winograd;
};

struct Cpu {                                          // filled by detect(); see cpu.cpp
    bool avx2, avx512, avx512_vnni, avx512_bf16, amx; // amx: of bf16 and of int8
    bool neon, neon_fp16, neon_dot, neon_bf16, neon_i8mm;
};
Cpu detect();

struct Isa {
    const char *name;
    bool (*supported)(const Cpu &);
    const Kernels *kernels;
    void (*enter)(); // on each thread before it computes; null: nothing to do
};
extern const Isa isas[]; // fastest first; scalar, the reference, is last
extern const int isa_count;
const Isa *find_isa(const char *name); // null name: the best one; null result: unknown or missing

// --- small things -------------------------------------------------------------------------------

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t padded(int64_t channels) { return round_up(channels, LANES); }
static inline int type_bytes(uint32_t type) {
    return type == FT_F32 || type == FT_I32 ? 4 : type == FT_U8 || type == FT_I8 ? 1 : 2;
}

constexpr float LEAST_PIXEL = 1e-30f;   // the largest of a pixel that is not taken for zeros
constexpr float TO_WHOLE = 12582912.0f; // 1.5 * 2^23: what is added and taken away is whole
constexpr int GROUP = 32;               // inputs of FT_I4 that share a scale

// Bytes of packed weights of k inputs, a multiple of LANES, by LANES outputs.
static inline int64_t packed_bytes(uint32_t type, int64_t k) {
    if (type != FT_I4) return k * LANES * type_bytes(type);
    return (k + GROUP - 1) / GROUP * LANES * 2 + k * LANES / 2;
}
static inline float bits_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint32_t float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float bf16_to_float(uint16_t x) { return bits_float(uint32_t(x) << 16); }

static inline uint16_t float_to_bf16(float f) { // to nearest, ties to even; NaN stays NaN
    const uint32_t u = float_bits(f);
    if (f != f) return uint16_t((u >> 16) | 0x40);
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float f16_to_float(uint16_t x) {
    const uint32_t exponent = x >> 10 & 31, fraction = x & 0x3ff;
    if (exponent == 0) { // zero or subnormal: fraction * 2^-24
        const float f = float(fraction) * 5.9604645e-8f;
        return x & 0x8000 ? -f : f;
    }
    const uint32_t high = exponent == 31 ? 0x7f800000u : (exponent + 112) << 23;
    return bits_float(uint32_t(x & 0x8000) << 16 | high | fraction << 13);
}

static inline uint16_t float_to_f16(float f) { // to nearest, ties to even; beyond: infinity
    const uint16_t sign = uint16_t(float_bits(f) >> 16 & 0x8000);
    const uint32_t u = float_bits(f) & 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;
    if (u >= 0x477ff000) return sign | 0x7c00;
    if (u < 0x38800000) // subnormal: the adder rounds at 2^-24, the last place of 0.5
        return uint16_t(sign | (float_bits(bits_float(u) + 0.5f) - 0x3f000000));
    return uint16_t(sign | (((u + 0xfff + (u >> 13 & 1)) >> 13) - (112 << 10)));
}

static inline int64_t bytes_of_pixel(const ft_tensor &t) {
    return int64_t(t.pixel) * type_bytes(t.type);
}
static inline int64_t bytes_of_row(const ft_tensor &t) {
    return int64_t(t.row) * type_bytes(t.type);
}

// --- threads ------------------------------------------------------------------------------------

class Pool {
  public:
    explicit Pool(int threads, void (*enter)());
    ~Pool();
    int threads() const;
    // job(context, index, thread) for every index below count; returns when all are done
    void run(int64_t count, void (*job)(const void *, int64_t, int), const void *context);

    template <class Job> void each(int64_t count, const Job &job) {
        run(
            count, [](const void *j, int64_t i, int t) { (*static_cast<const Job *>(j))(i, t); },
            &job);
    }

  private:
    struct State;
    State *state;
};

// --- ops: one file each -------------------------------------------------------------------------

class Streamer; // stream.h

struct Context { // of a run
    char *arena;
    const char *weights;
    const Kernels *kernels;
    Pool *pool;
    Streamer *streamer; // null: the weights stay

    char *at(const ft_tensor &t) const { return arena + t.offset; }
    char *at(const ft_tensor &t, int64_t y, int64_t x) const {
        return arena + t.offset + y * bytes_of_row(t) + x * bytes_of_pixel(t);
    }
};

struct Op {
    // null, or what is wrong with the op; bounds are checked apart
    const char *(*check)(const ft_op &);
    uint64_t (*scratch)(const ft_op &, const Kernels &, int threads); // bytes
    uint64_t (*weight_bytes)(const ft_op &);                          // from op.weight; 0: none
    uint64_t (*bias_bytes)(const ft_op &);
    void (*run)(const ft_op &, const Context &);
};
extern const Op matmul_op, group_norm_op, layer_norm_op, attention_op, embedding_op, sinusoid_op,
    unary_op, add_op, load_op, store_op, bytes_op, pick_op, moments_op, affine_op;
const Op *find_op(uint32_t kind); // null: unknown

// What follows a matmul's sums of up to MAX_ROWS pixels, each at ys, xs, for `blocks` blocks of the
// weights' outputs from `first`; matmul.cpp.  parity: of the output's pixels, in an upsample.
// scales: of these outputs, in place of the op's.
void finish_pixels(const ft_op &op, const Context &context, const float *acc, int parity,
                   int64_t first, int blocks, int rows, const int64_t *ys, const int64_t *xs,
                   const float *scales = nullptr);
// Whether weights are made of the activations' type before they are multiplied.
static inline bool widens(const ft_op &op) {
    return op.weight_type == FT_I4 || (op.weight_type == FT_I8 && !op.narrow);
}
// What multiplies; its `run` is null if there is nothing for these types.
static inline const TileKernel &tile_of(const ft_op &op, const Kernels &kernels) {
    return op.narrow ? kernels.narrow
                     : kernels.tile[op.a.type][widens(op) ? op.a.type : op.weight_type];
}
uint64_t scale_bytes(const ft_op &op); // from op.scales; 0: none
// The same as a 3x3 matmul of stride 1 with less than half of the products; winograd.cpp.
bool winograd_fits(const ft_op &op, const Kernels &kernels);
uint64_t winograd_scratch(const ft_op &op, const Kernels &kernels, int threads);
void winograd_run(const ft_op &op, const Context &context);
// Zeros around out, where it has a border and is not followed by other rows of the same image.
void zero_border(const ft_op &op, const Context &context);

} // namespace ft
