/* What a picture takes in a process that does nothing else: memory BUNDLE PROGRAMS SIZE THREADS
 * BUDGET prints of every stage the plan's peak, and the kernel's above that of before, in bytes. */
#include "ferro.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t base, peaks[FERRO_STAGES];

static uint64_t status_of(const char *name) {
    char line[256];
    uint64_t found = 0;
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, name, strlen(name))) found = strtoull(line + strlen(name), NULL, 10);
    if (file) fclose(file);
    return found << 10;
}

static void begin_anew(void) { /* the kernel's peak */
    FILE *file = fopen("/proc/self/clear_refs", "w");
    if (file) fputs("5", file), fclose(file);
}

/* A stage is told of while it is still there: what the next begins with is not its own. */
static int measure(void *user, const struct ferro_progress *progress) {
    const uint64_t peak = status_of("VmHWM:") - base;
    (void)user;
    if (peak > peaks[progress->stage]) peaks[progress->stage] = peak;
    return 0;
}

int main(int count, char **arguments) {
    char message[FERRO_MESSAGE_BYTES];
    struct ferro_options options;
    struct ferro_request request;
    struct ferro_plan plan;
    ferro *handle;
    if (count != 6) return 2;
    ferro_options_init(&options);
    ferro_request_init(&request);
    ferro_plan_init(&plan);
    options.threads = (uint32_t)atoi(arguments[4]);
    options.budget = strtoull(arguments[5], NULL, 10);
    request.prompt = "a red apple on a sky blue background";
    request.negative = "a penguin";
    request.guidance = 1.5;
    request.width = request.height = (uint32_t)atoi(arguments[3]);
    request.steps = 1;
    request.progress = measure;
    status_of("VmRSS:"); /* once, so that what it takes is there */
    base = status_of("VmRSS:");
    begin_anew();
    if (ferro_open(arguments[1], arguments[2], &options, &handle, message, sizeof message))
        return puts(message), 1;
    if (ferro_make_plan(handle, &request, &plan)) return puts(ferro_message(handle)), 1;
    const size_t bytes = (size_t)plan.width * plan.height * 3;
    uint8_t *rgb = malloc(bytes);
    if (!rgb || ferro_generate(handle, &request, rgb, bytes)) return puts(ferro_message(handle)), 1;
    for (int i = 0; i < FERRO_STAGES; i++)
        printf("%llu %llu\n", (unsigned long long)plan.stages[i].peak,
               (unsigned long long)peaks[i]);
    free(rgb);
    ferro_close(handle);
    return 0;
}
