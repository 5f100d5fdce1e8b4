// Products and sums round one by one: this file must be compiled without contraction.
#include "sampler.h"

#include <initializer_list>
#include <math.h>

#include "status.h"

namespace ferro_c {
namespace {

struct Term {
    float factor;
    const Floats *values;
};

// Products added left to right; one with a zero coefficient does not exist.
void sum(std::initializer_list<Term> terms, Floats &out) {
    Floats total(out.size());
    bool first = true;
    for (const Term &term : terms) {
        if (term.factor == 0) continue;
        if (term.values->size() != total.size())
            fail(FERRO_FORMAT,
                 "a sampler table reads a step that was not: compile the bundle again");
        for (size_t i = 0; i < total.size(); i++) {
            const float product = term.factor * (*term.values)[i];
            total[i] = first ? product : total[i] + product;
        }
        first = false;
    }
    out.swap(total);
}

// NumPy's sum of float64: pairs of halves, eight at a time, in buffers of 8192.
template <class Value> double pairwise(const Value &value, size_t first, size_t n) {
    if (n < 8) {
        double total = -0.0;
        for (size_t i = 0; i < n; i++) total += value(first + i);
        return total;
    }
    if (n > 128) {
        const size_t half = n / 2 - n / 2 % 8;
        return pairwise(value, first, half) + pairwise(value, first + half, n - half);
    }
    double r[8];
    for (size_t j = 0; j < 8; j++) r[j] = value(first + j);
    size_t i = 8;
    for (; i < n - n % 8; i += 8)
        for (size_t j = 0; j < 8; j++) r[j] += value(first + i + j);
    double total = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
    for (; i < n; i++) total += value(first + i);
    return total;
}

template <class Value> double mean(size_t n, const Value &value) {
    constexpr size_t BUFFER = 8192;
    double total = 0;
    for (size_t i = 0; i < n; i += BUFFER)
        total += pairwise(value, i, n - i < BUFFER ? n - i : BUFFER);
    return total / double(n);
}

} // namespace

Floats sample(const Programs &programs, const Table &table, size_t count, Noise &noise,
              const Predict &predict, const Stepped &stepped) {
    Floats x(count), scaled(count), output(count), denoised(count), previous, before, fresh(count);
    noise.draw(fresh.data(), count);
    sum({{table.start_noise, &fresh}}, x);
    for (uint32_t step = 1; step <= table.rows; step++) {
        const Row &row = programs.rows[uint64_t(table.row) + step - 1];
        sum({{row.scale, &x}}, scaled);
        predict(scaled, row.timestep, output);
        sum({{row.a, &x}, {row.b, &output}}, denoised);
        if (row.cn != 0) noise.draw(fresh.data(), count);
        sum({{row.cx, &x},
             {row.c0, &denoised},
             {row.c1, &previous},
             {row.c2, &before},
             {row.cn, &fresh}},
            x);
        for (float value : x)
            if (!isfinite(value))
                fail(FERRO_NUMBERS,
                     "the unet returned NaN or Inf at step %u of %u: the bundle's "
                     "precision overflows; convert with --activations fp32",
                     step, table.rows);
        stepped(step, x, denoised);
        before.swap(previous);
        previous = denoised;
    }
    return x;
}

void weigh(Floats &states, const Floats &weights, bool restore) {
    constexpr double MEANT = 0.01; // the least of a mean that says something
    bool plain = true;
    for (float weight : weights) plain = plain && weight == 1;
    if (plain) return;
    const size_t channels = states.size() / weights.size();
    const Floats original = states;
    for (size_t i = 0; i < states.size(); i++) states[i] = original[i] * weights[i / channels];
    const size_t n = states.size();
    const double was = mean(n, [&](size_t i) { return double(original[i]); });
    const double is = mean(n, [&](size_t i) { return double(states[i]); });
    const double size = MEANT * mean(n, [&](size_t i) { return double(fabsf(original[i])); });
    if (!restore || fmin(fabs(was), fabs(is)) < size) return;
    const float factor = float(was / is);
    for (float &value : states) value = value * factor;
}

} // namespace ferro_c
