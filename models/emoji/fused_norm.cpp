// Group normalization, with SiLU if asked for, forward and backward, of bf16 channels-last tensors.
//
// PyTorch's own runs these as several passes over memory and is, on a CPU, as slow as the
// convolutions around it.  Here each is one pass for the sums and one for the values.  All loops
// over `j` are of a fixed width, so that the compiler keeps them in vector registers; C must be a
// multiple of that width. Plain C++ with OpenMP, so that it compiles in a second; called through
// ctypes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kWidth = 16;

inline float widen(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline uint16_t narrow(float x) { // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float sigmoid(float x) {
    float t = std::fmin(std::fmax(x, -80.0f), 80.0f) * -1.44269504f;
    float n = (t + 12582912.0f) - 12582912.0f; // rounds to an integer
    float f = (t - n) * 0.69314718f;
    float e = 1 + f * (1 + f * (0.5f + f * (1.0f / 6 + f * (1.0f / 24 + f * (1.0f / 120)))));
    int32_t power = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return 1 / (1 + e * scale);
}

struct Shape {
    int64_t n, pixels, channels, groups;
};

// y = act(x * scale + shift) with scale and shift per channel.
void forward_picture(const Shape &s, const uint16_t *x, const float *weight, const float *bias,
                     double eps, bool act, float *mean, float *rstd, uint16_t *y) {
    std::vector<float> sum(s.channels), square(s.channels), scale(s.channels), shift(s.channels);
    for (int64_t c = 0; c < s.channels; c += kWidth) {
        float a[kWidth] = {}, b[kWidth] = {};
        for (int64_t p = 0; p < s.pixels; p++) {
            const uint16_t *row = x + p * s.channels + c;
            for (int j = 0; j < kWidth; j++) {
                float v = widen(row[j]);
                a[j] += v;
                b[j] += v * v;
            }
        }
        for (int j = 0; j < kWidth; j++) sum[c + j] = a[j], square[c + j] = b[j];
    }
    const int64_t per_group = s.channels / s.groups;
    for (int64_t g = 0; g < s.groups; g++) {
        double a = 0, b = 0;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) a += sum[c], b += square[c];
        const double count = double(s.pixels) * per_group, m = a / count;
        const double r = 1 / std::sqrt(std::fmax(b / count - m * m, 0.0) + eps);
        for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) {
            mean[c] = m, rstd[c] = r;
            scale[c] = weight[c] * r, shift[c] = bias[c] - m * weight[c] * r;
        }
    }
    for (int64_t p = 0; p < s.pixels; p++)
        for (int64_t c = 0; c < s.channels; c += kWidth)
            for (int j = 0; j < kWidth; j++) {
                const int64_t i = p * s.channels + c + j;
                float v = widen(x[i]) * scale[c + j] + shift[c + j];
                y[i] = narrow(act ? v * sigmoid(v) : v);
            }
}

// The gradient of the normalized value before the activation.
inline float inner_gradient(float x, float dy, float scale, float shift, bool act) {
    if (!act) return dy;
    float v = x * scale + shift, g = sigmoid(v);
    return dy * g * (1 + v * (1 - g));
}

void backward_picture(const Shape &s, const uint16_t *dy, const uint16_t *x, const float *mean,
                      const float *rstd, const float *weight, const float *bias, bool act,
                      uint16_t *dx, float *dweight, float *dbias) {
    std::vector<float> scale(s.channels), shift(s.channels), product(s.channels);
    std::vector<float> by_dz(s.channels), by_x(s.channels), constant(s.channels);
    for (int64_t c = 0; c < s.channels; c++) {
        scale[c] = weight[c] * rstd[c];
        shift[c] = bias[c] - mean[c] * scale[c];
    }
    for (int64_t c = 0; c < s.channels; c += kWidth) {
        float a[kWidth] = {}, b[kWidth] = {};
        for (int64_t p = 0; p < s.pixels; p++) {
            const int64_t i = p * s.channels + c;
            for (int j = 0; j < kWidth; j++) {
                float v = widen(x[i + j]);
                float dz = inner_gradient(v, widen(dy[i + j]), scale[c + j], shift[c + j], act);
                a[j] += dz;
                b[j] += dz * v;
            }
        }
        for (int j = 0; j < kWidth; j++) dbias[c + j] = a[j], product[c + j] = b[j];
    }
    for (int64_t c = 0; c < s.channels; c++)
        dweight[c] = (product[c] - mean[c] * dbias[c]) * rstd[c];
    // dx = rstd * (weight*dz - mean(weight*dz) - xhat * mean(weight*dz*xhat)), xhat = (x-mean)*rstd
    const int64_t per_group = s.channels / s.groups;
    for (int64_t g = 0; g < s.groups; g++) {
        double a = 0, b = 0;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; c++)
            a += weight[c] * dbias[c], b += weight[c] * dweight[c];
        const double count = double(s.pixels) * per_group;
        a /= count, b /= count;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) {
            by_dz[c] = rstd[c] * weight[c];
            by_x[c] = -rstd[c] * rstd[c] * b;
            constant[c] = -rstd[c] * a + rstd[c] * rstd[c] * b * mean[c];
        }
    }
    for (int64_t p = 0; p < s.pixels; p++)
        for (int64_t c = 0; c < s.channels; c += kWidth)
            for (int j = 0; j < kWidth; j++) {
                const int64_t i = p * s.channels + c + j;
                float v = widen(x[i]);
                float dz = inner_gradient(v, widen(dy[i]), scale[c + j], shift[c + j], act);
                dx[i] = narrow(dz * by_dz[c + j] + v * by_x[c + j] + constant[c + j]);
            }
}

} // namespace

extern "C" {

int norm_width() { return kWidth; }

// x, y: (n, pixels, channels) bf16; statistics: (n, 2, channels), mean and reciprocal deviation by
// channel
void norm_forward(int64_t n, int64_t pixels, int64_t channels, int64_t groups, const uint16_t *x,
                  const float *weight, const float *bias, double eps, int act, float *statistics,
                  uint16_t *y) {
    const Shape s{n, pixels, channels, groups};
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = i * pixels * channels;
        float *mean = statistics + 2 * i * channels;
        forward_picture(s, x + at, weight, bias, eps, act, mean, mean + channels, y + at);
    }
}

// gradients: (n, 2, channels), of the weight and of the bias, still to be summed over the pictures
void norm_backward(int64_t n, int64_t pixels, int64_t channels, int64_t groups, const uint16_t *dy,
                   const uint16_t *x, const float *statistics, const float *weight,
                   const float *bias, int act, uint16_t *dx, float *gradients) {
    const Shape s{n, pixels, channels, groups};
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = i * pixels * channels, c = 2 * i * channels;
        backward_picture(s, dy + at, x + at, statistics + c, statistics + c + channels, weight,
                         bias, act, dx + at, gradients + c, gradients + c + channels);
    }
}

} // extern "C"
