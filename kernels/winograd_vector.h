// The transforms of F(2x2, 3x3) as templates over vectors.  Include after the target pragma.
#pragma once
#include "rows_vector.h"
#include "winograd_int8.h"

namespace {

template <class V, template <class> class T>
void winograd_input_of(char *v, int64_t position_bytes, const char *x, int64_t row_bytes,
                       int64_t pixel_bytes, int channels) {
    typedef typename V::F F;
    for (int c = 0; c < channels; c += ft::LANES) {
        F t[4][4]; // columns done: B^T d
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            F d[4];
            for (int i = 0; i < 4; i++)
                d[i] = T<V>::load(x + i * row_bytes + j * pixel_bytes + c * T<V>::BYTES);
            t[0][j] = V::sub(d[0], d[2]);
            t[1][j] = V::add(d[1], d[2]);
            t[2][j] = V::sub(d[2], d[1]);
            t[3][j] = V::sub(d[1], d[3]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            char *row = v + 4 * i * position_bytes;
            T<V>::store(row + c * T<V>::BYTES, V::sub(t[i][0], t[i][2]));
            T<V>::store(row + position_bytes + c * T<V>::BYTES, V::add(t[i][1], t[i][2]));
            T<V>::store(row + 2 * position_bytes + c * T<V>::BYTES, V::sub(t[i][2], t[i][1]));
            T<V>::store(row + 3 * position_bytes + c * T<V>::BYTES, V::sub(t[i][1], t[i][3]));
        }
    }
}

template <class V> void winograd_input(char *v, int64_t position_bytes, const char *x,
                                       int64_t row_bytes, int64_t pixel_bytes, uint32_t type,
                                       int channels) {
    if (type == FT_F32)
        winograd_input_of<V, F32>(v, position_bytes, x, row_bytes, pixel_bytes, channels);
    else if (type == FT_BF16)
        winograd_input_of<V, Bf16>(v, position_bytes, x, row_bytes, pixel_bytes, channels);
    else
        winograd_input_of<V, F16>(v, position_bytes, x, row_bytes, pixel_bytes, channels);
}

template <class V, template <class> class T, template <class> class W> void
winograd_weights_of(char *u, int64_t position_bytes, const char *w, int64_t tap_bytes, int64_t n) {
    typedef typename V::F F;
    const F half = V::set(0.5f);
    for (int64_t e = 0; e < n; e += ft::LANES) {
        F t[4][3]; // G w
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) {
            F g[3];
            for (int i = 0; i < 3; i++)
                g[i] = W<V>::load(w + (3 * i + j) * tap_bytes + e * W<V>::BYTES);
            const F ends = V::mul(V::add(g[0], g[2]), half), middle = V::mul(g[1], half);
            t[0][j] = g[0];
            t[1][j] = V::add(ends, middle);
            t[2][j] = V::sub(ends, middle);
            t[3][j] = g[2];
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            char *row = u + 4 * i * position_bytes;
            const F ends = V::mul(V::add(t[i][0], t[i][2]), half), middle = V::mul(t[i][1], half);
            T<V>::store(row + e * T<V>::BYTES, t[i][0]);
            T<V>::store(row + position_bytes + e * T<V>::BYTES, V::add(ends, middle));
            T<V>::store(row + 2 * position_bytes + e * T<V>::BYTES, V::sub(ends, middle));
            T<V>::store(row + 3 * position_bytes + e * T<V>::BYTES, t[i][2]);
        }
    }
}

// The kinds that the engine multiplies: weights become of the type of the activations.
template <class V> void winograd_weights(char *u, int64_t position_bytes, uint32_t type,
                                         const char *w, int64_t tap_bytes, uint32_t w_type,
                                         int64_t n) {
    if (type == FT_BF16)
        winograd_weights_of<V, Bf16, Bf16>(u, position_bytes, w, tap_bytes, n);
    else if (type == FT_F32 && w_type == FT_F32)
        winograd_weights_of<V, F32, F32>(u, position_bytes, w, tap_bytes, n);
    else if (type == FT_F32 && w_type == FT_F16)
        winograd_weights_of<V, F32, F16>(u, position_bytes, w, tap_bytes, n);
}

template <class V> void winograd_output(float *out, const float *sums, int64_t position, int n) {
    typedef typename V::F F;
    for (int c = 0; c < n; c += ft::LANES) {
        F t[2][4]; // A^T m
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            F m[4];
            for (int i = 0; i < 4; i++) m[i] = V::load(sums + (4 * i + j) * position + c);
            t[0][j] = V::add(V::add(m[0], m[1]), m[2]);
            t[1][j] = V::sub(V::sub(m[1], m[2]), m[3]);
        }
        for (int i = 0; i < 2; i++) {
            V::store(out + 2 * i * ft::TILE + c, V::add(V::add(t[i][0], t[i][1]), t[i][2]));
            V::store(out + (2 * i + 1) * ft::TILE + c, V::sub(V::sub(t[i][1], t[i][2]), t[i][3]));
        }
    }
}

template <class V> constexpr ft::WinogradKernels winograd_kernels() {
    return {winograd_input<V>, winograd_weights<V>, winograd_weights_int8, winograd_output<V>};
}

} // namespace
