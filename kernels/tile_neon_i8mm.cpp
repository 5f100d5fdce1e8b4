// The int8 tile with ARMv8.6's matrix products: one instruction adds eight products to each of 2x2
// sums.
#if defined(__aarch64__)
#if defined(__clang__) && !defined(__ARM_FEATURE_MATMUL_INT8)
// clang knows the instructions only by a flag of the file, which CMakeLists.txt gives.
#include "tables.h"

const ft::Tiles ft::neon_i8mm_tiles = {};
#else
#if !defined(__clang__)
#pragma GCC target("arch=armv8.2-a+i8mm")
#endif
#include "simd_neon.h"

#include "tables.h"

namespace {

constexpr int ROWS = 6, STEP = 8, PAIRS = ft::LANES / 2; // of outputs

inline int32x4_t words(const char *p) { return vld1q_s32(reinterpret_cast<const int32_t *>(p)); }

// Eight inputs of two rows, one after the other.
inline int8x16_t two_rows(const char *first, const char *second) {
    return vcombine_s8(vld1_s8(reinterpret_cast<const int8_t *>(first)),
                       vld1_s8(reinterpret_cast<const int8_t *>(second)));
}

inline void add_row(const ft::Tile &t, int r, const char *row, bool add,
                    const int32x4_t (&sums)[4]) {
    const float scale = ft::Int8Pixel::of(row)->scale;
    float *const out = t.acc + r * t.stride;
    for (int q = 0; q < 4; q++) {
        const float32x4_t before = add ? vld1q_f32(out + 4 * q) : vdupq_n_f32(0);
        vst1q_f32(out + 4 * q, vfmaq_n_f32(before, vcvtq_f32_s32(sums[q]), scale));
    }
}

template <int R> void tile(const ft::Tile &t) {
    const char *w = t.w;
    for (int i = 0; i < t.tap_count; i++) {
        const char *row[R]; // those beyond row_count repeat the first and are not stored
        int32x4_t acc[R / 2][PAIRS];
        for (int r = 0; r < R; r++) row[r] = t.rows[r < t.row_count ? r : 0] + t.taps[i];
#pragma GCC unroll 4
        for (int p = 0; p < R / 2; p++)
#pragma GCC unroll 8
            for (int n = 0; n < PAIRS; n++) acc[p][n] = vdupq_n_s32(0);
        for (int64_t k = 0; k < t.k; k += STEP, w += STEP * ft::LANES) {
            int8x16_t a[R / 2];
#pragma GCC unroll 4
            for (int p = 0; p < R / 2; p++) a[p] = two_rows(row[2 * p] + k, row[2 * p + 1] + k);
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) { // quads of four outputs become eights of two and two
                const int32x4_t low = words(w + 16 * q), high = words(w + 64 + 16 * q);
                const int8x16_t b = vreinterpretq_s8_s32(vzip1q_s32(low, high)),
                                c = vreinterpretq_s8_s32(vzip2q_s32(low, high));
#pragma GCC unroll 4
                for (int p = 0; p < R / 2; p++) {
                    acc[p][2 * q] = vmmlaq_s32(acc[p][2 * q], a[p], b);
                    acc[p][2 * q + 1] = vmmlaq_s32(acc[p][2 * q + 1], a[p], c);
                }
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < R / 2; p++) { // 2x2 sums: a row of two, then the next
            int32x4_t first[4], second[4];
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) {
                const int64x2_t x = vreinterpretq_s64_s32(acc[p][2 * q]),
                                y = vreinterpretq_s64_s32(acc[p][2 * q + 1]);
                first[q] = vreinterpretq_s32_s64(vzip1q_s64(x, y));
                second[q] = vreinterpretq_s32_s64(vzip2q_s64(x, y));
            }
            const int r = 2 * p;
            if (r < t.row_count) add_row(t, r, row[r], t.add || i, first);
            if (r + 1 < t.row_count) add_row(t, r + 1, row[r + 1], t.add || i, second);
        }
    }
}

void run(const ft::Tile &t) {
    t.row_count > 4 ? tile<6>(t) : t.row_count > 2 ? tile<4>(t) : tile<2>(t);
}

double burn(uint32_t type, int64_t rounds) {
    if (type != FT_I8) return ft::neon_bf16_tiles.burn(type, rounds);
    constexpr int SUMS = 16;
    int32x4_t acc[SUMS] = {};
    int8x16_t a = vdupq_n_s8(0);
    for (int64_t i = 0; i < rounds; i++)
#pragma GCC unroll 16
        for (int j = 0; j < SUMS; j++) {
            __asm__ volatile("" : "+w"(a)); // what is multiplied stays unknown
            acc[j] = vmmlaq_s32(acc[j], a, a);
        }
    __asm__ volatile("" : : "r"(acc) : "memory"); // what is summed is used
    return double(rounds) * SUMS * 4 * STEP * 2;
}
} // namespace

const ft::Tiles ft::neon_i8mm_tiles = {{}, {run, ROWS, 1, STEP}, burn};
#endif
#endif
