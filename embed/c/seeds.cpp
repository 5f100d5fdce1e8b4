// Every operation rounds once, to float: this file must be compiled without contraction, and fma is
// the correctly rounded one of the standard, in an instruction or not.
#include "seeds.h"

#include <algorithm>
#include <math.h>

namespace ferro_c {
namespace {

// Cephes' single precision polynomials (S. Moshier), highest power first.
constexpr float LOG[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                         -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                         2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
constexpr float SIN[] = {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f};
constexpr float COS[] = {2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f};
constexpr float LN2_LOW = -2.12194440e-4f, LN2_HIGH = 0.693359375f;
constexpr float QUARTER_PI[] = {-0.78515625f, -2.4187564849853515625e-4f,
                                -3.77489497744594108e-8f}; // its negative, in three parts
constexpr float SQRT_HALF = 0.70710678118654752440f, TWO_PI = 6.28318530717958647692f,
                FOUR_BY_PI = 1.27323954473516268615f;

template <size_t n> float horner(const float (&coefficients)[n], float x) {
    float y = coefficients[0];
    for (size_t i = 1; i < n; i++) y = fmaf(y, x, coefficients[i]);
    return y;
}

float logarithm(float x) { // of positive normal floats
    int exponent;
    const float mantissa = frexpf(x, &exponent);
    const bool small = mantissa < SQRT_HALF;
    const float e = float(exponent - small);
    const float m = (small ? mantissa + mantissa : mantissa) - 1.0f;
    const float z = m * m;
    const float y = fmaf(horner(LOG, m) * m, z, e * LN2_LOW) - z * 0.5f;
    return fmaf(e, LN2_HIGH, m + y);
}

void sine_cosine(float x, float &sine, float &cosine) { // of floats in [0, 2 pi]
    const int32_t octant = (int32_t(x * FOUR_BY_PI) + 1) & ~1;
    for (float part : QUARTER_PI) x = fmaf(float(octant), part, x);
    const float z = x * x;
    float c = fmaf(horner(COS, z) * z, z, -(z * 0.5f)) + 1.0f;
    float s = fmaf(horner(SIN, z) * z, x, x);
    if (octant & 2) std::swap(s, c);
    sine = octant & 4 ? -s : s;
    cosine = (octant + 2) & 4 ? -c : c;
}

void box_muller(float *values) { // uniform to normal, pairs (j, j + 8)
    for (int j = 0; j < 8; j++) {
        const float radius = sqrtf(-2.0f * logarithm(1.0f - values[j]));
        float sine, cosine;
        sine_cosine(TWO_PI * values[j + 8], sine, cosine);
        values[j] = radius * cosine + 0.0f; // adding the mean turns -0 into 0
        values[j + 8] = radius * sine + 0.0f;
    }
}

} // namespace

// The Mersenne twister (Matsumoto & Nishimura 1998), from the low 32 bits of the seed as torch's.
Noise::Noise(uint64_t seed) {
    state[0] = uint32_t(seed);
    for (uint32_t i = 1; i < 624; i++)
        state[i] = 1812433253u * (state[i - 1] ^ state[i - 1] >> 30) + i;
}

uint32_t Noise::bits() {
    if (next == 624) {
        for (int i = 0; i < 624; i++) {
            const uint32_t y = (state[i] & 0x80000000u) | (state[(i + 1) % 624] & 0x7fffffffu);
            state[i] = state[(i + 397) % 624] ^ y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0);
        }
        next = 0;
    }
    uint32_t y = state[next++];
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

float Noise::uniform() { return float(bits() & 0xffffff) * 0x1p-24f; }

// Blocks of 16; where the last one is incomplete, the last 16 values are drawn anew.
void Noise::draw(float *values, size_t count) {
    for (size_t i = 0; i < count; i++) values[i] = uniform();
    for (size_t i = 0; i + LEAST <= count; i += LEAST) box_muller(values + i);
    if (count % LEAST == 0) return;
    float *const last = values + count - LEAST;
    for (size_t i = 0; i < LEAST; i++) last[i] = uniform();
    box_muller(last);
}

} // namespace ferro_c
