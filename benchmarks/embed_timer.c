/* What benchmarks/embed_c.py times: timer BUNDLE PROGRAMS THREADS PICTURES prints the milliseconds
 * of opening, then of every picture's text encoder, U-Net and decoder. */
#include "ferro.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double last, spent[FERRO_STAGES];

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return 1e3 * (double)time.tv_sec + 1e-6 * (double)time.tv_nsec;
}

static int take(void *user, const struct ferro_progress *progress) {
    const double time = now();
    (void)user;
    spent[progress->stage] += time - last;
    last = time;
    return 0;
}

int main(int count, char **arguments) {
    char message[FERRO_MESSAGE_BYTES];
    struct ferro_options options;
    struct ferro_request request;
    ferro *handle;
    static uint8_t rgb[3 << 20];
    if (count != 5) return 2;
    ferro_options_init(&options);
    ferro_request_init(&request);
    options.threads = (uint32_t)atoi(arguments[3]);
    request.prompt = "a red apple on a sky blue background";
    request.progress = take;
    const double start = now();
    if (ferro_open(arguments[1], arguments[2], &options, &handle, message, sizeof message))
        return puts(message), 1;
    printf("%.3f\n", now() - start);
    for (int i = 0; i < atoi(arguments[4]); i++) {
        request.seed = (uint64_t)i;
        for (int stage = 0; stage < FERRO_STAGES; stage++) spent[stage] = 0;
        last = now();
        if (ferro_generate(handle, &request, rgb, sizeof rgb))
            return puts(ferro_message(handle)), 1;
        printf("%.3f %.3f %.3f\n", spent[FERRO_TEXT], spent[FERRO_UNET], spent[FERRO_DECODER]);
    }
    ferro_close(handle);
    return 0;
}
