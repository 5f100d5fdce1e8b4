// What is done to rows, as templates over vectors of LANES floats.
//
// Include after the target pragma of the file; V is the trait of a simd_*.h.  A max or min is NaN
// where its second operand is, so limits come first to let NaN through.
#pragma once
#include "tables.h"

namespace {

using ft::LANES;

// --- types in memory ----------------------------------------------------------------------------

template <class V> struct F32 {
    static constexpr int BYTES = 4;
    static constexpr bool SHORT = false;                  // keeps less than exp2_short gives
    static typename V::F keep(char *p, typename V::F x) { // store; what load would give
        store(p, x);
        return x;
    }
    static typename V::F load(const char *p) { return V::load(reinterpret_cast<const float *>(p)); }
    static void store(char *p, typename V::F x) { V::store(reinterpret_cast<float *>(p), x); }
};

template <class V> struct Bf16 {
    static constexpr int BYTES = 2;
    static constexpr bool SHORT = true;
    static typename V::F keep(char *p, typename V::F x) {
        return V::keep_bf16(reinterpret_cast<uint16_t *>(p), x);
    }
    static typename V::F load(const char *p) {
        return V::load_bf16(reinterpret_cast<const uint16_t *>(p));
    }
    static void store(char *p, typename V::F x) {
        V::store_bf16(reinterpret_cast<uint16_t *>(p), x);
    }
};

template <class V> struct F16 {
    static constexpr int BYTES = 2;
    static constexpr bool SHORT = false;
    static typename V::F keep(char *p, typename V::F x) {
        store(p, x);
        return load(p);
    }
    static typename V::F load(const char *p) {
        return V::load_f16(reinterpret_cast<const uint16_t *>(p));
    }
    static void store(char *p, typename V::F x) {
        V::store_f16(reinterpret_cast<uint16_t *>(p), x);
    }
};

// --- functions ----------------------------------------------------------------------------------

template <class V> struct Math {
    typedef typename V::F F;

    template <int N> static F polynomial(F x, const float (&c)[N]) {
        F sum = V::set(c[N - 1]);
        for (int i = N - 2; i >= 0; i--) sum = V::fma(sum, x, V::set(c[i]));
        return sum;
    }

    // 2^x for x <= 127; zero, or nearly so, below V::LEAST.  Minimax: relative error 2e-9.
    static F exp2(F x) {
        static constexpr float around[] = {1.0f,           6.93147203e-1f, 2.40226479e-1f,
                                           5.55033247e-2f, 9.61843736e-3f, 1.33988744e-3f,
                                           1.53533618e-4f};
        static constexpr float above[] = {1.0f,           6.93147004e-1f, 2.40229830e-1f,
                                          5.54833412e-2f, 9.67884064e-3f, 1.24396884e-3f,
                                          2.17022549e-4f};
        return exp2_by(x, around, above);
    }

    // The same for a result that is rounded to bf16: 8e-5, a fiftieth of its last place.
    static F exp2_short(F x) {
        static constexpr float around[] = {9.99928073e-1f, 6.93260986e-1f, 2.42611131e-1f,
                                           5.51716694e-2f};
        static constexpr float above[] = {9.99925196e-1f, 6.95833564e-1f, 2.26067156e-1f,
                                          7.80245215e-2f};
        return exp2_by(x, around, above);
    }

    // 2^whole times a polynomial in the rest: over [-0.5, 0.5], or over [0, 1) where one
    // instruction splits there.
    template <int N> static F exp2_by(F x, const float (&around)[N], const float (&above)[N]) {
        if constexpr (V::SPLITS) {
            return V::scale2(polynomial(V::above_whole(x), above), x);
        } else {
            x = V::max(V::set(V::LEAST), x);
            const F n = V::round(x);
            return V::scale2(polynomial(V::sub(x, n), around), n);
        }
    }

    // x / (1 + e^(-a x)), by e^-|a x|, which does not overflow
    static F swish(F x, float a) {
        const F e = exp2(V::mul(V::abs(x), V::set(-a * 1.44269504f)));
        const F y = V::div(x, V::add(V::set(1), e));
        return V::negative(x, V::mul(y, e), y);
    }

    // x Phi(x).  The tail Phi(-t) is e^(-t^2 / 2) / (t + 3) times a polynomial in
    // q = (t - 3) / (t + 3), minimax over 0 <= t <= 14.5: relative error 5e-8.
    static F gelu(F x) {
        static constexpr float c[] = {7.29083668e-1f,  -5.09332328e-1f, 2.30019399e-1f,
                                      -4.72552854e-2f, -1.04800940e-2f, 6.92000797e-3f,
                                      1.07473384e-3f,  -8.97755971e-4f, -2.62991129e-4f};
        const F t = V::min(V::set(20), V::abs(x));
        const F inverse = V::div(V::set(1), V::add(t, V::set(3)));
        const F q = V::mul(V::sub(t, V::set(3)), inverse);
        const F e = exp2(V::mul(V::mul(t, t), V::set(-0.72134752f)));
        const F tail = V::mul(V::mul(t, V::mul(e, inverse)), polynomial(q, c));
        return V::negative(x, V::sub(V::zero(), tail), V::sub(x, tail));
    }

    static F tanh3(F x) {
        const F e = exp2(V::mul(V::abs(x), V::set(-2.0f / 3 * 1.44269504f)));
        const F y = V::div(V::mul(V::set(3), V::sub(V::set(1), e)), V::add(V::set(1), e));
        return V::negative(x, V::sub(V::zero(), y), y);
    }

    static F activate(F x, uint32_t act) {
        switch (act) {
        case FT_SILU: return swish(x, 1);
        case FT_GELU: return gelu(x);
        case FT_QUICK_GELU: return swish(x, 1.702f);
        case FT_RELU: return V::max(V::zero(), x);
        case FT_TANH3: return tanh3(x);
        default: return x;
        }
    }
};

// --- kernels of one type ------------------------------------------------------------------------

template <class V, class T> struct TypedRows {
    typedef typename V::F F;
    typedef Math<V> M;

    static F loaded(const float *p, int block) { // zero where there is none
        return p ? V::load(p + block * LANES) : V::zero();
    }

    static F scales(const ft::Finish &f, int block) {
        return f.scale ? V::load(f.scale + block * LANES) : V::set(1);
    }

    static void finish(const ft::Finish &f) { f.geglu ? finish_geglu(f) : finish_block(f); }

    static void put_row(const ft::Finish &f, int row, int block, F v) {
        const int64_t at = int64_t(block) * LANES * T::BYTES;
        if (f.residual) v = V::add(v, T::load(f.residual[row] + at));
        if (f.late) v = M::activate(v, f.act);
        T::store(f.out[row] + at, v);
    }

    static void finish_block(const ft::Finish &f) {
        for (int b = 0; b < f.blocks; b++) {
            const F scale = scales(f, b), bias = loaded(f.bias, b), add = loaded(f.add, b);
            for (int r = 0; r < f.rows; r++) {
                const F acc = V::load(f.acc + r * ft::TILE + b * LANES);
                F v = V::add(V::fma(acc, scale, bias), add);
                if (f.act && !f.late) v = M::activate(v, f.act);
                put_row(f, r, b, v);
            }
        }
    }

    static void finish_geglu(const ft::Finish &f) {
        for (int b = 0; b < f.blocks; b++) {
            const F scale = scales(f, 2 * b), gate_scale = scales(f, 2 * b + 1);
            const F bias = loaded(f.bias, 2 * b), gate_bias = loaded(f.bias, 2 * b + 1);
            for (int r = 0; r < f.rows; r++) {
                const float *acc = f.acc + r * ft::TILE + 2 * b * LANES;
                const F gate = M::gelu(V::fma(V::load(acc + LANES), gate_scale, gate_bias));
                put_row(f, r, b, V::mul(V::fma(V::load(acc), scale, bias), gate));
            }
        }
    }

    static F weights(const float *scores, F scale, F minus) {
        const F x = V::fma(V::load(scores), scale, minus);
        return T::SHORT ? M::exp2_short(x) : M::exp2(x);
    }

    // The weights from `top`, zeros behind them; the sum is of the weights as they are used.
    static float softmax(const ft::Softmax &s, float top) {
        const F scale = V::set(s.scale), minus = V::set(-top);
        const float *scores = s.scores;
        char *out = s.out;
        const int valid = s.valid, padded = s.padded;
        F sum = V::zero(), more = V::zero(); // two, so that none waits for the one before
        int i = 0;
        for (; i + 2 * LANES <= valid; i += 2 * LANES) {
            const F a = weights(scores + i, scale, minus);
            const F b = weights(scores + i + LANES, scale, minus);
            sum = V::add(sum, T::keep(out + i * T::BYTES, a));
            more = V::add(more, T::keep(out + (i + LANES) * T::BYTES, b));
        }
        for (; i < padded; i += LANES) {
            F p = V::zero();
            if (i < valid) p = weights(scores + i, scale, minus);
            if (i < valid && valid - i < LANES) p = V::keep(p, valid - i, V::zero());
            sum = V::add(sum, T::keep(out + i * T::BYTES, p));
        }
        return V::sum(V::add(sum, more));
    }

    static void scaled(char *out, const float *acc, float f, int n) {
        for (int i = 0; i < n; i += LANES)
            T::store(out + i * T::BYTES, V::mul(V::load(acc + i), V::set(f)));
    }

    // BLOCKS of channels at a time, so that their sums stay in registers
    template <int BLOCKS> static void moments(const char *x, int64_t pixel_bytes, int pixels,
                                              const float *shift, float *sum, float *square) {
        F middle[BLOCKS], s[BLOCKS], q[BLOCKS];
        for (int b = 0; b < BLOCKS; b++) {
            middle[b] = V::load(shift + b * LANES);
            s[b] = V::load(sum + b * LANES);
            q[b] = V::load(square + b * LANES);
        }
        for (int p = 0; p < pixels; p++)
            for (int b = 0; b < BLOCKS; b++) {
                const F d = V::sub(T::load(x + p * pixel_bytes + b * LANES * T::BYTES), middle[b]);
                s[b] = V::add(s[b], d);
                q[b] = V::fma(d, d, q[b]);
            }
        for (int b = 0; b < BLOCKS; b++) {
            V::store(sum + b * LANES, s[b]);
            V::store(square + b * LANES, q[b]);
        }
    }

    static void moments(const char *x, int64_t pixel_bytes, int pixels, int channels,
                        const float *shift, float *sum, float *square) {
        constexpr int MANY = V::MOMENT_BLOCKS;
        int c = 0;
        for (; c + MANY * LANES <= channels; c += MANY * LANES)
            moments<MANY>(x + int64_t(c) * T::BYTES, pixel_bytes, pixels, shift + c, sum + c,
                          square + c);
        for (; c < channels; c += LANES)
            moments<1>(x + int64_t(c) * T::BYTES, pixel_bytes, pixels, shift + c, sum + c,
                       square + c);
    }

    static void affine(char *out, const char *x, int channels, const float *scale,
                       const float *shift, uint32_t act) {
        for (int c = 0; c < channels; c += LANES) {
            const F v = V::fma(T::load(x + c * T::BYTES), V::load(scale + c), V::load(shift + c));
            T::store(out + c * T::BYTES, M::activate(v, act));
        }
    }

    // `value` of every channel less `mean`, nothing for the padding
    static F centred(const char *x, int c, int channels, F mean) {
        const F d = V::sub(T::load(x + c * T::BYTES), mean);
        return c + LANES <= channels ? d : V::keep(d, channels - c, V::zero());
    }

    static void layer_norm(char *out, const char *x, int channels, float eps, const float *gamma,
                           const float *beta) {
        F sum = V::zero(), square = V::zero();
        for (int c = 0; c < channels; c += LANES)
            sum = V::add(sum, centred(x, c, channels, V::zero()));
        const F mean = V::set(V::sum(sum) / float(channels));
        for (int c = 0; c < channels; c += LANES) {
            const F d = centred(x, c, channels, mean);
            square = V::fma(d, d, square);
        }
        const F scale = V::set(1 / __builtin_sqrtf(V::sum(square) / float(channels) + eps));
        for (int c = 0; c < channels; c += LANES) {
            const F d = V::mul(centred(x, c, channels, mean), scale);
            const F y = V::fma(d, V::load(gamma + c), V::load(beta + c));
            T::store(out + c * T::BYTES,
                     c + LANES <= channels ? y : V::keep(y, channels - c, V::zero()));
        }
    }

    static void unary(char *out, const char *a, const char *b, int n, uint32_t act) {
        for (int64_t i = 0; i < int64_t(n) * T::BYTES; i += LANES * T::BYTES) {
            F v = T::load(a + i);
            if (b) v = V::add(v, T::load(b + i));
            T::store(out + i, M::activate(v, act));
        }
    }

    // Rounded to the nearest 127th of the largest; all NaN if one is not finite.
    static void to_int8(char *pixel, const char *x, int channels) {
        F top = V::zero(), zeros = V::zero();
        for (int c = 0; c < channels; c += LANES) {
            const F v = T::load(x + c * T::BYTES);
            top = V::max(V::abs(v), top);
            zeros = V::fma(v, V::zero(), zeros); // NaN by an infinity, too
        }
        const bool finite = V::sum(zeros) == 0;
        const float largest = V::top(top);
        const bool some = finite && largest >= ft::LEAST_PIXEL;
        ft::Int8Pixel &head = *reinterpret_cast<ft::Int8Pixel *>(pixel);
        head = {some ? largest / 127 : finite ? 0 : __builtin_nanf(""), 0, {}};
        if (!some) return void(memset(&head + 1, 0, size_t(channels)));
        const F inverse = V::set(127 / largest), shift = V::set(ft::TO_WHOLE);
        F sum = V::zero(); // whole numbers, exact
        for (int c = 0; c < channels; c += LANES) {
            const F moved = V::fma(T::load(x + c * T::BYTES), inverse, shift);
            const F whole = V::sub(moved, shift);
            V::store_int8(reinterpret_cast<char *>(&head + 1) + c, whole);
            sum = V::add(sum, whole);
        }
        head.sum = int32_t(V::sum(sum));
    }
};

// --- weights in few bits ------------------------------------------------------------------------

// Rows of weights, inputs in order: each LANES outputs, in pairs where the type is bf16.
template <class V, class T> struct WeightRows {
    typedef typename V::F F;
    static char *put(char *out, F first, F second) {
        T::store(out, first);
        T::store(out + LANES * T::BYTES, second);
        return out + 2 * LANES * T::BYTES;
    }
};
template <class V> struct WeightRows<V, Bf16<V>> {
    typedef typename V::F F;
    static char *put(char *out, F first, F second) {
        V::store_pairs(out, first, second);
        return out + 4 * LANES;
    }
};

template <class V, class T> struct Widen {
    typedef typename V::F F;
    typedef WeightRows<V, T> Rows;

    static void int8(char *out, const char *w, int64_t k) {
        for (; k > 0; k -= 4, w += 4 * LANES) {
            out = Rows::put(out, V::template field<24, 24>(w), V::template field<16, 24>(w));
            out = Rows::put(out, V::template field<8, 24>(w), V::template field<0, 24>(w));
        }
    }

    template <int I> static char *two(char *out, const char *w, F scale) {
        return Rows::put(out, V::mul(V::template field<28 - 4 * I, 28>(w), scale),
                         V::mul(V::template field<24 - 4 * I, 28>(w), scale));
    }

    static void int4(char *out, const char *w, int64_t k) {
        for (; k > 0; k -= ft::GROUP) {
            const F scale = V::load_f16(reinterpret_cast<const uint16_t *>(w));
            w += 2 * LANES;
            for (int64_t i = 0; i < ft::GROUP && i < k; i += 8, w += 4 * LANES) {
                out = two<0>(out, w, scale);
                out = two<2>(out, w, scale);
                out = two<4>(out, w, scale);
                out = two<6>(out, w, scale);
            }
        }
    }
};

// --- kernels ------------------------------------------------------------------------------------

template <class V> struct AllRows {
    typedef typename V::F F;
    static constexpr float LOG2_127 = 6.98868469f;

    template <class Do> static auto typed(uint32_t type, const Do &call) {
        if (type == FT_BF16) return call(TypedRows<V, Bf16<V>>());
        if (type == FT_F16) return call(TypedRows<V, F16<V>>());
        return call(TypedRows<V, F32<V>>());
    }

    static void finish(const ft::Finish &f) {
        typed(f.type, [&](auto rows) { rows.finish(f); });
    }

    static float here(const ft::Softmax &s) { // the largest; the scale, above zero, keeps the order
        const F lowest = V::set(-__builtin_inff());
        F most = lowest, more = lowest; // two, so that none waits for the one before
        int i = 0;
        for (; i + 2 * LANES <= s.valid; i += 2 * LANES) {
            most = V::max(V::load(s.scores + i), most);
            more = V::max(V::load(s.scores + i + LANES), more);
        }
        for (; i + LANES <= s.valid; i += LANES) most = V::max(V::load(s.scores + i), most);
        if (i < s.valid) more = V::max(V::keep(V::load(s.scores + i), s.valid - i, lowest), more);
        return V::top(V::max(most, more)) * s.scale;
    }

    static float power_of_2(float x) {
        float powers[LANES];
        V::store(powers, Math<V>::exp2(V::set(x)));
        return powers[0];
    }

    // The whole weights of LANES scores.
    static F whole(const float *scores, F scale, F minus) {
        const F x = Math<V>::exp2_short(V::fma(V::load(scores), scale, minus));
        return V::sub(V::add(x, V::set(ft::TO_WHOLE)), V::set(ft::TO_WHOLE));
    }

    // Weights in 127ths of the largest of these.
    static float softmax_int8(const ft::Softmax &s) {
        const float most = here(s);
        ft::Int8Pixel &head = *reinterpret_cast<ft::Int8Pixel *>(s.out);
        char *const out = reinterpret_cast<char *>(&head + 1);
        const bool some = most > -__builtin_inff();
        const F scale = V::set(s.scale), minus = V::set(some ? LOG2_127 - most : 0);
        F sum = V::zero(), more = V::zero(); // whole numbers, exact
        int i = 0;
        for (; i + 2 * LANES <= s.valid; i += 2 * LANES) {
            const F a = whole(s.scores + i, scale, minus);
            const F b = whole(s.scores + i + LANES, scale, minus);
            V::store_int8(out + i, a);
            V::store_int8(out + i + LANES, b);
            sum = V::add(sum, a);
            more = V::add(more, b);
        }
        for (; i < s.padded; i += LANES) {
            F p = V::zero();
            if (i < s.valid) p = whole(s.scores + i, scale, minus);
            if (i < s.valid && s.valid - i < LANES) p = V::keep(p, s.valid - i, V::zero());
            V::store_int8(out + i, p);
            sum = V::add(sum, p);
        }
        const float total = V::sum(V::add(sum, more)), before = *s.top;
        const bool numbers = total == total;
        if (most > before) *s.top = most;
        head.sum = numbers ? int32_t(total) : 0;
        head.scale = !numbers ? total : some ? power_of_2(most - *s.top) / 127 : 0;
        const float alpha = *s.top == before ? 1 : power_of_2(before - *s.top);
        *s.sum = *s.sum * alpha + float(head.sum) * head.scale;
        return alpha;
    }

    static float softmax(const ft::Softmax &s) {
        if (s.type == FT_I8) return softmax_int8(s);
        const float found = here(s), most = found > *s.top ? found : *s.top;
        const float shift = most == -__builtin_inff() ? 0 : most; // nothing so far: all are zero
        const float sum = typed(s.type, [&](auto rows) { return rows.softmax(s, shift); });
        float alpha = 1;
        if (!(most == *s.top)) alpha = power_of_2(*s.top - shift);
        *s.sum = *s.sum * alpha + sum;
        *s.top = most;
        return alpha;
    }

    static void rescale(float *x, float f, int n) {
        int i = 0;
        for (; i + LANES <= n; i += LANES) V::store(x + i, V::mul(V::load(x + i), V::set(f)));
        for (; i < n; i++) x[i] *= f;
    }

    static void scaled(char *out, uint32_t type, const float *acc, float f, int n) {
        typed(type, [&](auto rows) { rows.scaled(out, acc, f, n); });
    }

    static void moments(const char *x, uint32_t type, int64_t pixel_bytes, int pixels, int channels,
                        const float *shift, float *sum, float *square) {
        typed(type, [&](auto rows) {
            rows.moments(x, pixel_bytes, pixels, channels, shift, sum, square);
        });
    }

    static void affine(char *out, const char *x, uint32_t type, int channels, const float *scale,
                       const float *shift, uint32_t act) {
        typed(type, [&](auto rows) { rows.affine(out, x, channels, scale, shift, act); });
    }

    static void layer_norm(char *out, const char *x, uint32_t type, int channels, float eps,
                           const float *gamma, const float *beta) {
        typed(type, [&](auto rows) { rows.layer_norm(out, x, channels, eps, gamma, beta); });
    }

    static void unary(char *out, const char *a, const char *b, uint32_t type, int n, uint32_t act) {
        typed(type, [&](auto rows) { rows.unary(out, a, b, n, act); });
    }

    static void to_int8(char *pixel, const char *x, uint32_t type, int channels) {
        typed(type, [&](auto rows) { rows.to_int8(pixel, x, channels); });
    }

    template <class T> static void widen_to(char *out, const char *w, uint32_t w_type, int64_t k) {
        w_type == FT_I8 ? Widen<V, T>::int8(out, w, k) : Widen<V, T>::int4(out, w, k);
    }

    static void widen(char *out, uint32_t type, const char *w, uint32_t w_type, int64_t k) {
        if (type == FT_BF16) return widen_to<Bf16<V>>(out, w, w_type, k);
        if (type == FT_F16) return widen_to<F16<V>>(out, w, w_type, k);
        widen_to<F32<V>>(out, w, w_type, k);
    }

    static constexpr ft::Rows table = {finish, softmax,    rescale, scaled,  moments,
                                       affine, layer_norm, unary,   to_int8, widen};
};

} // namespace
