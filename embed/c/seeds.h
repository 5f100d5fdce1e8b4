// torch.randn's values from a seed.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace ferro_c {

class Noise { // the stream of one torch CPU generator; runtime/seeds.py is the reference
  public:
    explicit Noise(uint64_t seed);
    void draw(float *values, size_t count); // at least LEAST

    static constexpr size_t LEAST = 16; // fewer are drawn by another algorithm, in doubles

  private:
    uint32_t bits();
    float uniform();
    uint32_t state[624];
    int next = 624;
};

} // namespace ferro_c
