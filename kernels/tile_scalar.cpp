// The tile as the formula says: the reference of every other instruction set.
#include <cmath>

#include "simd_scalar.h"
#include "tables.h"

namespace ft {
namespace {

constexpr int ROWS = 8;

// Weight (k, n) of a block: k by n, and for bf16 pairs of k by n.
template <uint32_t TYPE> float weight(const char *w, int64_t k, int n) {
    const int64_t i = TYPE == FT_BF16 ? (k / 2 * LANES + n) * 2 + k % 2 : k * LANES + n;
    return get(w, TYPE, i);
}

template <uint32_t TYPE, uint32_t WEIGHT> void tile(const Tile &t) {
    const int bytes = WEIGHT == FT_F32 ? 4 : 2;
    for (int b = 0; b < t.blocks; b++)
        for (int r = 0; r < t.row_count; r++)
            for (int n = 0; n < LANES; n++) {
                float &out = t.acc[r * t.stride + b * LANES + n];
                float sum = t.add ? out : 0;
                for (int i = 0; i < t.tap_count; i++) {
                    const char *w = t.w + b * t.w_block + int64_t(i) * t.k * LANES * bytes;
                    for (int k = 0; k < t.k; k++)
                        sum += get(t.rows[r] + t.taps[i], TYPE, k) * weight<WEIGHT>(w, k, n);
                }
                out = sum;
            }
}

void narrow(const Tile &t) {
    for (int b = 0; b < t.blocks; b++)
        for (int r = 0; r < t.row_count; r++)
            for (int n = 0; n < LANES; n++) {
                float &out = t.acc[r * t.stride + b * LANES + n];
                float sum = t.add ? out : 0;
                for (int i = 0; i < t.tap_count; i++) {
                    const char *w = t.w + b * t.w_block + int64_t(i) * t.k * LANES;
                    const char *a = t.rows[r] + t.taps[i];
                    int32_t dot = 0;
                    for (int k = 0; k < t.k; k++)
                        dot += int8_t(a[k]) * int8_t(w[(k / 4 * LANES + n) * 4 + k % 4]);
                    sum = std::fma(float(dot), Int8Pixel::of(a)->scale, sum);
                }
                out = sum;
            }
}

double burn(uint32_t, int64_t rounds) {
    float acc[8] = {}, x = 1.0f;
    for (int64_t i = 0; i < rounds; i++) {
        for (float &a : acc) a = a * 0.5f + x;
        __asm__ volatile("" : "+m"(acc), "+m"(x));
    }
    return double(rounds) * 8 * 2;
}

} // namespace

const Tiles scalar_tiles = {
    {{{tile<FT_F32, FT_F32>, ROWS, MAX_BLOCKS, 2},
      {tile<FT_F32, FT_BF16>, ROWS, MAX_BLOCKS, 2},
      {tile<FT_F32, FT_F16>, ROWS, MAX_BLOCKS, 2}},
     {{}, {tile<FT_BF16, FT_BF16>, ROWS, MAX_BLOCKS, 2}, {}},
     {{}, {}, {tile<FT_F16, FT_F16>, ROWS, MAX_BLOCKS, 2}}},
    {narrow, ROWS, MAX_BLOCKS, 4},
    burn,
};

} // namespace ft
