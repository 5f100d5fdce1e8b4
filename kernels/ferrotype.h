/* Ferrotype's native engine: a program is a flat array of ops over one arena and one weights file.
 *
 * Nothing here knows about Python, files or models.  The caller maps the weights, allocates the
 * arena, and fills in the ops with offsets into both; ft_program_create checks every offset before
 * anything runs, so that a malformed program is refused and never executed.  ft_program_run
 * allocates nothing.  Docs: docs/engine.md.
 */
#ifndef FERROTYPE_H
#define FERROTYPE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define FT_API __declspec(dllexport)
#else
#define FT_API __attribute__((visibility("default")))
#endif

#define FT_ABI 3    /* of this header; ft_abi() is that of the library */
#define FT_LANES 16 /* outputs in a block of packed weights; channels are stored padded to it */
#define FT_MAX_THREADS 64
#define FT_NO_WEIGHT UINT64_MAX

/* I8 and I4 are types of packed matrices alone: integers, -127..127 with an f32 scale per output,
 * and -8..7 with an f16 scale per output for every 32 inputs of a tap, which lies before them. */
enum ft_type {
    FT_F32 = 0,
    FT_BF16 = 1,
    FT_F16 = 2,
    FT_I32 = 3,
    FT_U8 = 4,
    FT_I8 = 5,
    FT_I4 = 6,
};

/* Channels-last image, or a sequence of tokens (h = 1), in the arena.
 *
 * Pixel (y, x) starts at offset + (y * row + x * pixel) elements.  `pixel` is at least c rounded up
 * to FT_LANES, and the channels from c to there are zero.  With border = 1 the arena also holds one
 * pixel on every side, at y or x of -1, h and w; who writes the tensor fills it with zeros.
 * An absent tensor has h = 0.
 *
 * Planes, what comes in and goes out: c of them, `pixel` elements apart, rows of w without a gap.
 */
struct ft_tensor {
    uint64_t offset; /* bytes into the arena, a multiple of an element; 64 is fastest */
    uint32_t type;
    uint32_t h, w, c;
    uint32_t pixel, row; /* elements from one pixel, one row, to the next */
    uint32_t border;
};

/* What an op computes.  The fields of ft_op that a kind does not name must be zero, or
 * FT_NO_WEIGHT for weights. */
enum ft_kind {
    /* out = act(conv(a, weight) + bias + add) + residual; a linear layer is the 1x1 case.
     * sides: 1 or 3, stride: 1 or 2, pad: rows and columns of border read above and to the left.
     * With `b`, a and b lie side by side as input channels (1x1 only).
     * upsample: the image is doubled (nearest) before the 3x3 convolution; the weights are the four
     * 2x2 convolutions that this equals.  geglu: blocks of values and gates alternate in the
     * weights, out = value * gelu(gate).  late: the activation follows the residual. */
    FT_MATMUL = 1,
    /* out = act(group_norm(a | b) * gamma + beta), a and b side by side; weight: gamma, bias: beta
     */
    FT_GROUP_NORM = 2,
    FT_LAYER_NORM = 3, /* the same over the channels of each pixel */
    /* out = softmax(a b^T * scale) c by heads of `size` channels; a: queries, b: keys, c: values */
    FT_ATTENTION = 4,
    FT_EMBEDDING = 5, /* out[i] = weight[a[i]] + bias[i]; a: i32 ids, weight: (size, c) f32 rows */
    FT_SINUSOID = 6,  /* out: per number of a, cos then sin (flip: sin then cos), shift x */
    FT_UNARY = 7,     /* out = act(a) */
    FT_ADD = 8,       /* out = act(a + b) */
    FT_LOAD = 9,      /* out = channels-last of a, planar f32 (c planes), each times x; act first */
    FT_STORE = 10,    /* out, planar f32, = a * x + y */
    FT_BYTES = 11,    /* out: u8, (h, w, 3) without padding = round(clamp(a * x + y, 0, 1) * 255) */
    FT_PICK = 12,     /* out = the row of a at the first id of b that equals size; size < 0: at the
                       * largest id */
    /* A group norm of an image that comes band by band, from the top:
     * FT_MOMENTS adds a's rows to out, (1, 1, 5 * padded channels) f32, which holds the sums; size:
     * rows before a's.
     * FT_AFFINE: out = act(a normalized * gamma + beta) with b, the sums of all rows; size: the
     * pixels that they are of.  Together they give the bytes of FT_GROUP_NORM. */
    FT_MOMENTS = 13,
    FT_AFFINE = 14,
};

enum ft_act {
    FT_NONE = 0,
    FT_SILU = 1,
    FT_GELU = 2,       /* exact, with erf */
    FT_QUICK_GELU = 3, /* x * sigmoid(1.702 x) */
    FT_RELU = 4,
    FT_TANH3 = 5, /* 3 tanh(x / 3): the clamp of TAESD */
};

struct ft_op {
    uint32_t kind;
    uint32_t act;
    struct ft_tensor out, a, b, c; /* c: residual of matmul, values of attention */
    struct ft_tensor add;          /* matmul: f32 vector of out.c channels (h = w = 1) */
    uint64_t weight, bias;         /* bytes into the weights, multiples of 64 */
    uint64_t scales;               /* matmul of I8: f32 by output, as bias; of upsample, by parity
                                    * first */
    uint32_t weight_type;
    int32_t side, stride, pad; /* matmul; pad 1 reads a border above and left, 0 does not */
    int32_t upsample, geglu, late;
    int32_t winograd;            /* matmul, 3x3 of stride 1 and even sides: fewer, less exact
                                  * products; 1: where that is faster, 2: wherever it can be,
                                  * 3: as 2, but never on a matrix unit (nor is 1) */
    int32_t narrow;              /* matmul of I8: each pixel of a (and b) is rounded to int8 with a
                                  * scale of its own, and integers are multiplied; attention: both
                                  * products are of int8 */
    int32_t band;                /* out is rows of an image: 1: others are above, 2: below, 3: both;
                                  * its border is not written there */
    int32_t groups;              /* group norm */
    int32_t heads, size, causal; /* attention: size of a head; embedding: rows; pick: the id */
    int32_t flip;                /* sinusoid */
    float scale, x, y;           /* attention: scale; norms: x is eps; sinusoid: x is shift */
    uint64_t scratch;            /* bytes into the arena, a multiple of 64; ft_op_scratch says
                                  * how many are needed */
};

/* Weights that ops first..last read, bytes into the file. */
struct ft_range {
    uint64_t offset, bytes;
    uint64_t first, last;
};

typedef struct ft_program ft_program;

/* What the machine has, by the names of FERROTYPE_ISA, fastest first; NULL after the last. */
FT_API uint32_t ft_abi(void);
FT_API uint32_t ft_op_bytes(void); /* sizeof(struct ft_op), for a check by bindings */
FT_API const char *ft_isa_name(uint32_t index);
FT_API int ft_isa_supported(uint32_t index);

/* Bytes of scratch that an op needs with so many threads; UINT64_MAX for a malformed op. */
FT_API uint64_t ft_op_scratch(const struct ft_op *op, uint32_t threads, const char *isa);
/* Whether a matmul is computed by Winograd's products on that instruction set. */
FT_API int ft_op_winograd(const struct ft_op *op, const char *isa);
/* Bytes of packed weights that an op reads from `weight`; UINT64_MAX for a malformed op. */
FT_API uint64_t ft_op_weight_bytes(const struct ft_op *op);

/* Check ops against an arena and weights of these sizes and start the threads.
 * Checked is that nothing outside of them is touched; which tensors share space is the caller's
 * affair (out may be c of a matmul, and a or b of a norm, unary or add, if it is the same in
 * shape). isa: a name, or NULL for the best that this machine runs. On failure returns NULL and
 * writes one line to message. */
FT_API ft_program *ft_program_create(const struct ft_op *ops, size_t count, size_t arena_bytes,
                                     size_t weight_bytes, uint32_t threads, const char *isa,
                                     char *message, size_t message_bytes);
FT_API void ft_program_free(ft_program *program);
FT_API const char *ft_program_isa(const ft_program *program);

/* Let the weights, which must be mapped from a file, be in memory only around their use: at most
 * `window` bytes of them at once, brought in ahead by a thread of its own and dropped behind.
 * Ranges are in the order of `first`; pages in none come when they are touched and stay
 * until the run ends.  Not during a run.
 * Returns 0, or -1 and one line in message.  ft_can_stream: whether this system can. */
FT_API int ft_can_stream(void);
FT_API int ft_program_stream(ft_program *program, const struct ft_range *ranges, size_t count,
                             uint64_t window, char *message, size_t message_bytes);

/* Where a file that was cut short while it is mapped would end the process (SIGBUS), end the run
 * instead.  The pages that are missing become zeros: map the file anew before another run.
 * Changes the process's handler; the one before is asked for all other addresses.  0 if done. */
FT_API int ft_guard_install(void);

/* Run all ops; nanoseconds, if not NULL, receives the time of each.
 * cancel, if not NULL, is read between ops: a value other than 0 ends the run.
 * Returns the number of ops that were run: fewer than all, and not cancelled, if the weights'
 * file is no longer what was mapped. */
FT_API size_t ft_program_run(ft_program *program, void *arena, const void *weights,
                             uint64_t *nanoseconds, const volatile int *cancel);

/* FLOP/s of a plain loop of the multiply-accumulates that `isa` uses for `type`, on `threads`
 * threads for about `seconds`: the ceiling that kernels are measured against.  0: no such kernel.
 */
FT_API double ft_ceiling(const char *isa, uint32_t type, uint32_t threads, double seconds);

#ifdef __cplusplus
}
#endif
#endif
