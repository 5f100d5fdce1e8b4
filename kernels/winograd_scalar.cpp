// The transforms of F(2x2, 3x3) as the formulas: V = B^T d B, U = G w G^T, Y = A^T M A.
#include "simd_scalar.h"
#include "tables.h"
#include "winograd_int8.h"

namespace ft {
namespace {

const float B[4][4] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}}; // B^T
const float G[4][3] = {{1, 0, 0}, {0.5f, 0.5f, 0.5f}, {0.5f, -0.5f, 0.5f}, {0, 0, 1}};
const float A[2][4] = {{1, 1, 1, 0}, {0, 1, -1, -1}}; // A^T

// out = left in left^T, ROWS x ROWS from SIDE x SIDE; columns first, so that sums of whole numbers
// and those of every instruction set have the same bits.
template <int ROWS, int SIDE> void both_sides(const float (&left)[ROWS][SIDE],
                                              const float (&in)[SIDE][SIDE],
                                              float (&out)[ROWS][ROWS]) {
    float t[ROWS][SIDE] = {};
    for (int i = 0; i < ROWS; i++)
        for (int l = 0; l < SIDE; l++)
            for (int k = 0; k < SIDE; k++)
                if (left[i][k] != 0) t[i][l] += left[i][k] * in[k][l];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < ROWS; j++) {
            out[i][j] = 0;
            for (int l = 0; l < SIDE; l++)
                if (left[j][l] != 0) out[i][j] += t[i][l] * left[j][l];
        }
}

void input(char *v, int64_t position_bytes, const char *x, int64_t row_bytes, int64_t pixel_bytes,
           uint32_t type, int channels) {
    for (int c = 0; c < channels; c++) {
        float d[4][4], t[4][4];
        for (int i = 0; i < 16; i++)
            d[i / 4][i % 4] = get(x + i / 4 * row_bytes + i % 4 * pixel_bytes, type, c);
        both_sides(B, d, t);
        for (int i = 0; i < 16; i++) put(v + i * position_bytes, type, c, t[i / 4][i % 4]);
    }
}

void weights(char *u, int64_t position_bytes, uint32_t type, const char *w, int64_t tap_bytes,
             uint32_t w_type, int64_t n) {
    for (int64_t e = 0; e < n; e++) {
        float g[3][3], t[4][4];
        for (int i = 0; i < 9; i++) g[i / 3][i % 3] = get(w + i * tap_bytes, w_type, e);
        both_sides(G, g, t);
        for (int i = 0; i < 16; i++) put(u + i * position_bytes, type, e, t[i / 4][i % 4]);
    }
}

void output(float *out, const float *sums, int64_t position, int n) {
    for (int c = 0; c < n; c++) {
        float m[4][4], y[2][2];
        for (int i = 0; i < 16; i++) m[i / 4][i % 4] = sums[i * position + c];
        both_sides(A, m, y);
        for (int i = 0; i < 4; i++) out[i * TILE + c] = y[i / 2][i % 2];
    }
}

} // namespace

const WinogradKernels scalar_winograd = {input, weights, winograd_weights_int8, output};

} // namespace ft
