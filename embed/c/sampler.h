// The loop that runs a sampler table: runtime/samplers.py, float by float.
#pragma once
#include <functional>
#include <vector>

#include "programs.h"
#include "seeds.h"

namespace ferro_c {

using Floats = std::vector<float>;

// What the network says of a scaled x at a timestep.
using Predict = std::function<void(const Floats &x, float timestep, Floats &output)>;
// After each step, from 1.
using Stepped = std::function<void(uint32_t step, const Floats &x, const Floats &denoised)>;

// From noise to latents; throws FERRO_NUMBERS where they are not finite.
Floats sample(const Programs &programs, const Table &table, size_t count, Noise &noise,
              const Predict &predict, const Stepped &stepped);

// States of all tokens times weights; with `restore` the mean is made what it was: prompts.weigh.
void weigh(Floats &states, const Floats &weights, bool restore);

} // namespace ferro_c
