/* Ferrotype for apps: draw with a native bundle, from C, Swift, Kotlin or whatever calls C.
 *
 * A bundle folder and the file of programs that `ferrotype compile` wrote for it give the bytes
 * that Python's native engine gives, within a budget that is known before any weight is read. Every
 * function returns FERRO_OK or another status, and says more in one line of text.  Nothing throws,
 * nothing is global: handles are independent of each other.  One handle runs one call at a time,
 * further threads wait; ferro_cancel may be called at any time.  Docs: docs/embed-c.md.
 */
#ifndef FERRO_H
#define FERRO_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define FERRO_API
#else
#define FERRO_API __attribute__((visibility("default")))
#endif

#define FERRO_ABI 1             /* of this header; ferro_abi() is that of the library */
#define FERRO_MESSAGE_BYTES 512 /* enough for any message */

enum ferro_status {
    FERRO_OK = 0,
    FERRO_ARGUMENT = 1,  /* the caller asked for something that there is not */
    FERRO_FILE = 2,      /* a file is missing, cannot be read, or changed meanwhile */
    FERRO_FORMAT = 3,    /* a file is damaged, of another version, or of another bundle */
    FERRO_BUDGET = 4,    /* nothing fits the budget; the plan has the smallest that would do */
    FERRO_MEMORY = 5,    /* the system gave no memory, or no thread */
    FERRO_PROMPT = 6,    /* the prompt is no UTF-8, too long, or has a weight out of range */
    FERRO_NUMBERS = 7,   /* a network returned NaN or infinity */
    FERRO_CANCELLED = 8, /* by ferro_cancel or a progress callback */
};

enum ferro_stage {
    FERRO_TEXT = 0,
    FERRO_TEXT_2 = 1,
    FERRO_UNET = 2,
    FERRO_DECODER = 3,
};
#define FERRO_STAGES 4

typedef struct ferro ferro;

/* Structures begin with their own size, so that later versions can add to them: initialise them
 * with the functions below, which fill in what nobody changes. */
struct ferro_options {
    size_t bytes;
    uint32_t threads; /* 1 to 64; 0: one for every core */
    int verify;       /* hash the weights, once; else only their sizes are compared */
    const char *isa; /* an instruction set by name, as ft_isa_name of ferrotype.h; NULL: the best */
    uint64_t budget; /* bytes that may be in memory at any time; 0: no limit */
};

struct ferro_progress {
    uint32_t stage;       /* that has just finished a piece of work */
    uint32_t step, steps; /* of the U-Net, from 1; 0 in the other stages */
    uint32_t width, height, channels;
    const float *latents;  /* of this step, channels * height * width; NULL in the other stages */
    const float *denoised; /* the network's present idea of the result, for ferro_preview */
};

/* Called on the caller's own thread; a value other than 0 ends the run with FERRO_CANCELLED. */
typedef int (*ferro_progress_callback)(void *user, const struct ferro_progress *progress);

struct ferro_request {
    size_t bytes;
    const char *prompt;     /* UTF-8, with weights and BREAK as docs/prompts.md has them */
    const char *negative;   /* NULL or "": none */
    uint64_t seed;          /* torch's */
    uint32_t width, height; /* pixels; 0: the first that was compiled */
    uint32_t steps;         /* 0: the bundle's own, or the first that was compiled */
    const char *sampler;    /* NULL: likewise */
    double guidance;        /* below 0: the bundle's own */
    ferro_progress_callback progress; /* or NULL */
    void *user;
};

/* What a stage takes, in bytes. */
struct ferro_stage_plan {
    uint32_t used;     /* 0: the bundle has no such stage */
    uint32_t streamed; /* whether weights pass through a window */
    uint32_t rows;     /* of the image at a time; 0: all */
    uint64_t weights, arena, other, peak;
};

struct ferro_plan {
    size_t bytes;
    uint64_t peak;     /* bytes, at any time */
    uint64_t smallest; /* the smallest budget that would do */
    uint32_t width, height, steps, chunks, threads;
    struct ferro_stage_plan stages[FERRO_STAGES];
};

FERRO_API uint32_t ferro_abi(void);
FERRO_API void ferro_options_init(struct ferro_options *options);
FERRO_API void ferro_request_init(struct ferro_request *request);
FERRO_API void ferro_plan_init(struct ferro_plan *plan);

/* Open a bundle, a folder, and its programs, a file.  Neither may be changed while it is open.
 * options may be NULL.  message, of message_bytes, may be NULL. */
FERRO_API int ferro_open(const char *bundle, const char *programs,
                         const struct ferro_options *options, ferro **handle, char *message,
                         size_t message_bytes);
/* Not while another call uses the handle; NULL is fine. */
FERRO_API void ferro_close(ferro *handle);
/* One line of what the last call that failed had to say; valid until the next call. */
FERRO_API const char *ferro_message(const ferro *handle);

/* What drawing would take; nothing is loaded.  With FERRO_BUDGET the plan is the sparest there is.
 */
FERRO_API int ferro_make_plan(ferro *handle, const struct ferro_request *request,
                              struct ferro_plan *plan);
/* Draw into rgb: height rows of width pixels of 3 bytes, without gaps; rgb_bytes is its size. */
FERRO_API int ferro_generate(ferro *handle, const struct ferro_request *request, uint8_t *rgb,
                             size_t rgb_bytes);
/* End what runs; from any thread.  It ends within an op, some milliseconds. */
FERRO_API void ferro_cancel(ferro *handle);
/* A rough picture of a step at once, from a progress callback: width * height * 3 bytes of its
 * latents' size. */
FERRO_API int ferro_preview(const ferro *handle, const struct ferro_progress *progress,
                            uint8_t *rgb, size_t rgb_bytes);

/* For tests of a port, and for apps that count tokens: ids and weights of a prompt, `most` chunks
 * at most, each of ferro_chunk_tokens; ids and weights have room for `most` of them.  stage:
 * FERRO_TEXT or FERRO_TEXT_2.  dropped, if not NULL: whether the end of the prompt did not fit. */
FERRO_API int ferro_tokenize(ferro *handle, uint32_t stage, const char *prompt, uint32_t most,
                             int32_t *ids, float *weights, uint32_t *chunks, int *dropped);
FERRO_API uint32_t ferro_chunk_tokens(const ferro *handle);
/* The first `count` values, at least 16, of torch's noise. */
FERRO_API int ferro_noise(uint64_t seed, float *values, size_t count);

#ifdef __cplusplus
}
#endif
#endif
