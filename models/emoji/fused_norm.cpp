// Group normalization, with SiLU if asked for, forward and backward, of bf16 channels-last tensors.
//
// PyTorch's own runs these as several passes over memory and is, on a CPU, as slow as the convolutions
// around it.  Here each is one pass for the sums and one for the values.  All loops over `j` are of a
// fixed width, so that the compiler keeps them in vector registers; C must be a multiple of that width.
#include <ATen/Parallel.h>
#include <torch/extension.h>

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

inline uint16_t narrow(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float sigmoid(float x) {
  float t = std::fmin(std::fmax(x, -80.0f), 80.0f) * -1.44269504f;
  float n = (t + 12582912.0f) - 12582912.0f;  // rounds to an integer
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

Shape shape_of(const at::Tensor& x, int64_t groups) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kBFloat16 && x.size(1) % kWidth == 0);
  TORCH_CHECK(x.is_contiguous(at::MemoryFormat::ChannelsLast) && x.size(1) % groups == 0);
  return {x.size(0), x.size(2) * x.size(3), x.size(1), groups};
}

const uint16_t* bits(const at::Tensor& x) { return static_cast<const uint16_t*>(x.data_ptr()); }

// y = act(x * scale + shift) with scale and shift per channel.
void forward_picture(const Shape& s, const uint16_t* x, const float* weight, const float* bias,
                     double eps, bool act, float* mean, float* rstd, uint16_t* y) {
  std::vector<float> sum(s.channels), square(s.channels), scale(s.channels), shift(s.channels);
  for (int64_t c = 0; c < s.channels; c += kWidth) {
    float a[kWidth] = {}, b[kWidth] = {};
    for (int64_t p = 0; p < s.pixels; p++) {
      const uint16_t* row = x + p * s.channels + c;
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

void backward_picture(const Shape& s, const uint16_t* dy, const uint16_t* x, const float* mean,
                      const float* rstd, const float* weight, const float* bias, bool act,
                      uint16_t* dx, float* dweight, float* dbias) {
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

}  // namespace

// -> y, and (n, 2, C) mean and reciprocal deviation by channel for the backward pass
std::vector<at::Tensor> forward(at::Tensor x, at::Tensor weight, at::Tensor bias, int64_t groups,
                                double eps, bool act) {
  const Shape s = shape_of(x, groups);
  at::Tensor y = at::empty_like(x);
  at::Tensor statistics = at::empty({s.n, 2, s.channels}, x.options().dtype(at::kFloat));
  const float *w = weight.data_ptr<float>(), *b = bias.data_ptr<float>();
  const uint16_t* in = bits(x);
  uint16_t* out = static_cast<uint16_t*>(y.data_ptr());
  float* mean = statistics.data_ptr<float>();
  at::parallel_for(0, s.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const int64_t at = n * s.pixels * s.channels;
      float* m = mean + 2 * n * s.channels;
      forward_picture(s, in + at, w, b, eps, act, m, m + s.channels, out + at);
    }
  });
  return {y, statistics};
}

// -> dx, dweight, dbias
std::vector<at::Tensor> backward(at::Tensor dy, at::Tensor x, at::Tensor statistics,
                                 at::Tensor weight, at::Tensor bias, int64_t groups, bool act) {
  const Shape s = shape_of(x, groups);
  shape_of(dy, groups);
  at::Tensor dx = at::empty_like(x);
  at::Tensor by_picture = at::empty({s.n, 2, s.channels}, statistics.options());
  const float *w = weight.data_ptr<float>(), *b = bias.data_ptr<float>();
  const float* mean = statistics.data_ptr<float>();
  const uint16_t *in = bits(x), *gradient = bits(dy);
  uint16_t* out = static_cast<uint16_t*>(dx.data_ptr());
  float* dwb = by_picture.data_ptr<float>();
  at::parallel_for(0, s.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const int64_t at = n * s.pixels * s.channels, c = 2 * n * s.channels;
      backward_picture(s, gradient + at, in + at, mean + c, mean + c + s.channels, w, b, act,
                       out + at, dwb + c, dwb + c + s.channels);
    }
  });
  at::Tensor sums = by_picture.sum(0);
  return {dx, sums[0], sums[1]};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("forward", &forward);
  module.def("backward", &backward);
}
