/* Draw a picture: example BUNDLE PROGRAMS PROMPT OUT.png [SEED [BUDGET_IN_MIB]] */
#include "ferro.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- a PNG without compression ---------------------------------------------------------------- */

static uint32_t crc_of(const uint8_t *data, size_t bytes, uint32_t crc) {
    for (size_t i = 0; i < bytes; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return crc;
}

static void put32(uint8_t *to, uint32_t value) {
    for (int i = 0; i < 4; i++) to[i] = (uint8_t)(value >> (24 - 8 * i));
}

static void write_chunk(FILE *file, const char *type, const uint8_t *data, size_t bytes) {
    uint8_t head[8], tail[4];
    put32(head, (uint32_t)bytes);
    memcpy(head + 4, type, 4);
    put32(tail, ~crc_of(data, bytes, crc_of(head + 4, 4, ~0u)));
    fwrite(head, 1, 8, file);
    if (bytes) fwrite(data, 1, bytes, file);
    fwrite(tail, 1, 4, file);
}

/* Each row is a stored block of deflate: a filter byte and its pixels, up to 65535 bytes. */
static int write_png(const char *path, const uint8_t *rgb, uint32_t width, uint32_t height) {
    const size_t row = (size_t)width * 3 + 1;
    uint8_t header[13] = {0}, *zlib = malloc(2 + height * (row + 5) + 4), *to = zlib;
    uint32_t a = 1, b = 0; /* Adler-32 */
    FILE *file = row <= 0xffff && zlib ? fopen(path, "wb") : NULL;
    if (!file) return free(zlib), -1;
    *to++ = 0x78, *to++ = 0x01;
    for (uint32_t y = 0; y < height; y++) {
        const uint8_t block[6] = {y + 1 == height, row & 0xff,       row >> 8,
                                  ~row & 0xff,     ~row >> 8 & 0xff, 0};
        memcpy(to, block, 6);
        memcpy(to + 6, rgb + y * (row - 1), row - 1);
        for (size_t i = 0; i < row; i++) a = (a + to[5 + i]) % 65521, b = (b + a) % 65521;
        to += row + 5;
    }
    put32(to, b << 16 | a);
    put32(header, width);
    put32(header + 4, height);
    header[8] = 8, header[9] = 2; /* bits, RGB */
    fwrite("\x89PNG\r\n\x1a\n", 1, 8, file);
    write_chunk(file, "IHDR", header, sizeof header);
    write_chunk(file, "IDAT", zlib, (size_t)(to + 4 - zlib));
    write_chunk(file, "IEND", NULL, 0);
    free(zlib);
    return fclose(file);
}

/* --- a picture -------------------------------------------------------------------------------- */

static int show(void *user, const struct ferro_progress *progress) {
    (void)user;
    if (progress->step) fprintf(stderr, "step %u of %u\n", progress->step, progress->steps);
    return 0; /* another value would cancel */
}

int main(int count, char **arguments) {
    if (count < 5) {
        fprintf(stderr, "usage: example BUNDLE PROGRAMS PROMPT OUT.png [SEED [BUDGET_IN_MIB]]\n");
        return 2;
    }
    char message[FERRO_MESSAGE_BYTES];
    struct ferro_options options;
    struct ferro_request request;
    struct ferro_plan plan;
    ferro *handle;
    ferro_options_init(&options);
    ferro_request_init(&request);
    ferro_plan_init(&plan);
    if (count > 6) options.budget = strtoull(arguments[6], NULL, 10) << 20;
    request.prompt = arguments[3];
    if (count > 5) request.seed = strtoull(arguments[5], NULL, 10);
    request.progress = show;
    if (ferro_open(arguments[1], arguments[2], &options, &handle, message, sizeof message)) {
        fprintf(stderr, "Error: %s\n", message);
        return 1;
    }
    int status = ferro_make_plan(handle, &request, &plan);
    uint8_t *rgb = status ? NULL : malloc((size_t)plan.width * plan.height * 3);
    if (!status) {
        fprintf(stderr, "%ux%u, %u steps, peak %.1f MiB\n", plan.width, plan.height, plan.steps,
                (double)plan.peak / (1 << 20));
        status = ferro_generate(handle, &request, rgb, (size_t)plan.width * plan.height * 3);
    }
    if (status) fprintf(stderr, "Error: %s\n", ferro_message(handle));
    if (!status && (status = write_png(arguments[4], rgb, plan.width, plan.height)))
        perror(arguments[4]);
    free(rgb);
    ferro_close(handle);
    return status != 0;
}
