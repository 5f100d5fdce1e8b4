// What is done to rows, as the formulas say: the reference of every other instruction set.
#include <cmath>

#include "simd_scalar.h"
#include "tables.h"

namespace ft {
namespace {

float gelu(float x) { return 0.5f * x * std::erfc(-x * float(M_SQRT1_2)); }

float activate(float x, uint32_t act) {
    switch (act) {
    case FT_SILU: return x / (1 + std::exp(-x));
    case FT_GELU: return gelu(x);
    case FT_QUICK_GELU: return x / (1 + std::exp(-1.702f * x));
    case FT_RELU: return x < 0 ? 0 : x;
    case FT_TANH3: return 3 * std::tanh(x / 3);
    default: return x;
    }
}

void finish(const Finish &f) {
    for (int r = 0; r < f.rows; r++)
        for (int i = 0; i < f.blocks * LANES; i++) {
            const float *acc = f.acc + r * TILE;
            // with geglu, every second block holds gates
            const int j = f.geglu ? i / LANES * 2 * LANES + i % LANES : i;
            const auto sum = [&](int n) {
                return std::fma(acc[n], f.scale ? f.scale[n] : 1, f.bias ? f.bias[n] : 0);
            };
            float v = sum(j);
            if (f.geglu) v *= gelu(sum(j + LANES));
            if (f.add) v += f.add[i];
            if (!f.late) v = activate(v, f.act);
            if (f.residual) v += get(f.residual[r], f.type, i);
            if (f.late) v = activate(v, f.act);
            put(f.out[r], f.type, i, v);
        }
}

// Weights in 127ths of the largest of these.
float softmax_int8(const Softmax &s) {
    float here = -INFINITY;
    bool finite = true;
    for (int i = 0; i < s.valid; i++) {
        here = std::fmax(here, s.scores[i] * s.scale);
        finite = finite && !std::isnan(s.scores[i] * s.scale);
    }
    Int8Pixel head = {};
    int8_t *weights = reinterpret_cast<int8_t *>(s.out + sizeof head);
    for (int i = 0; i < s.padded; i++) {
        const bool some = i < s.valid && here != -INFINITY && finite;
        weights[i] =
            some ? int8_t(std::nearbyint(127 * std::exp2(s.scores[i] * s.scale - here))) : 0;
        head.sum += weights[i];
    }
    const float top = std::fmax(here, *s.top);
    const float alpha = top == *s.top ? 1 : std::exp2(*s.top - top);
    head.scale = finite ? (top == -INFINITY ? 0 : std::exp2(here - top) / 127) : NAN;
    *s.sum = *s.sum * alpha + float(head.sum) * head.scale;
    *s.top = top;
    memcpy(s.out, &head, sizeof head);
    return alpha;
}

float softmax(const Softmax &s) {
    if (s.type == FT_I8) return softmax_int8(s);
    float top = *s.top;
    for (int i = 0; i < s.valid; i++) top = std::fmax(top, s.scores[i] * s.scale);
    const float shift = top == -INFINITY ? 0 : top; // nothing so far: every weight is zero
    const float alpha = top == *s.top ? 1 : std::exp2(*s.top - shift);
    float sum = 0;
    for (int i = 0; i < s.padded; i++) {
        put(s.out, s.type, i, i < s.valid ? std::exp2(s.scores[i] * s.scale - shift) : 0);
        sum += get(s.out, s.type, i); // of the weights as they are used
    }
    *s.sum = *s.sum * alpha + sum;
    *s.top = top;
    return alpha;
}

void rescale(float *x, float f, int n) {
    for (int i = 0; i < n; i++) x[i] *= f;
}

void scaled(char *out, uint32_t type, const float *acc, float f, int n) {
    for (int i = 0; i < n; i++) put(out, type, i, acc[i] * f);
}

void moments(const char *x, uint32_t type, int64_t pixel_bytes, int pixels, int channels,
             const float *shift, float *sum, float *square) {
    for (int p = 0; p < pixels; p++)
        for (int c = 0; c < channels; c++) {
            const float d = get(x + p * pixel_bytes, type, c) - shift[c];
            sum[c] += d;
            square[c] += d * d;
        }
}

void affine(char *out, const char *x, uint32_t type, int channels, const float *scale,
            const float *shift, uint32_t act) {
    for (int c = 0; c < channels; c++)
        put(out, type, c, activate(get(x, type, c) * scale[c] + shift[c], act));
}

void layer_norm(char *out, const char *x, uint32_t type, int channels, float eps,
                const float *gamma, const float *beta) {
    double mean = 0, variance = 0;
    for (int c = 0; c < channels; c++) mean += get(x, type, c);
    mean /= channels;
    for (int c = 0; c < channels; c++) {
        const double d = get(x, type, c) - mean;
        variance += d * d;
    }
    const double scale = 1 / std::sqrt(variance / channels + eps);
    for (int c = 0; c < channels; c++)
        put(out, type, c, float((get(x, type, c) - mean) * scale * gamma[c] + beta[c]));
    for (int c = channels; c % LANES; c++) put(out, type, c, 0);
}

void unary(char *out, const char *a, const char *b, uint32_t type, int n, uint32_t act) {
    for (int i = 0; i < n; i++)
        put(out, type, i, activate(get(a, type, i) + (b ? get(b, type, i) : 0), act));
}

void to_int8(char *pixel, const char *x, uint32_t type, int channels) {
    float largest = 0;
    bool finite = true;
    for (int c = 0; c < channels; c++) {
        finite = finite && std::isfinite(get(x, type, c));
        largest = std::fmax(largest, std::fabs(get(x, type, c)));
    }
    const bool some = finite && largest >= LEAST_PIXEL;
    Int8Pixel head = {some ? largest / 127 : finite ? 0 : NAN, 0, {}};
    int8_t *values = reinterpret_cast<int8_t *>(pixel + sizeof head);
    for (int c = 0; c < channels; c++) {
        const float whole = std::fma(get(x, type, c), 127 / largest, TO_WHOLE) - TO_WHOLE;
        values[c] = some ? int8_t(whole) : int8_t(0);
        head.sum += values[c];
    }
    memcpy(pixel, &head, sizeof head);
}

// Four inputs of an output lie side by side in I8, eight in I4; see docs/engine.md.
void widen(char *out, uint32_t type, const char *w, uint32_t w_type, int64_t k) {
    for (int64_t i = 0; i < k; i++)
        for (int n = 0; n < LANES; n++) {
            float x;
            if (w_type == FT_I8) {
                x = float(int8_t(w[(i / 4 * LANES + n) * 4 + i % 4]));
            } else {
                const char *group = w + packed_bytes(FT_I4, i / GROUP * GROUP);
                const int64_t j = i % GROUP;
                const uint8_t both =
                    uint8_t(group[2 * LANES + (j / 8 * LANES + n) * 4 + j % 8 / 2]);
                const int four = j % 2 ? both >> 4 : both & 15;
                x = float(four < 8 ? four : four - 16) * get(group, FT_F16, n);
            }
            put(out, type, type == FT_BF16 ? (i / 2 * LANES + n) * 2 + i % 2 : i * LANES + n, x);
        }
}

} // namespace

const Rows scalar_rows = {finish, softmax,    rescale, scaled,  moments,
                          affine, layer_norm, unary,   to_int8, widen};

} // namespace ft
