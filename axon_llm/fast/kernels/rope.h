// Rotary positions: a head turned in one pass. What a compiler makes of the halves that change places takes ten times
// as long as the arithmetic.

#pragma once

#include <cmath>

#include "strips.h"

namespace {

// A head's D channels, turned by a token's cosines and sines; `to` may be where they are.
inline void turn_head(const uint16_t* from, uint16_t* to, const uint16_t* cos, const uint16_t* sin, int64_t D) {
  const int64_t half = D / 2;
  for (int64_t d = 0; d < half; d += 16) {
    const int64_t left = half - d;
    const Floats one = load(from + d, left), two = load(from + half + d, left);
    const Floats first = two * load(sin + d, left), second = one * load(sin + half + d, left);
    store(to + d, fms(one, load(cos + d, left), first), left);
    store(to + half + d, fma(two, load(cos + half + d, left), second), left);
  }
}

// Cosines and sines of positions [B, T], times a scale, [B, T, D] each. The D / 2 frequencies are float32, and so are
// the angles: those that the model was trained with.
inline void put_angles(const Tensor& positions, const Tensor& frequencies, double scale, uint16_t* cos, uint16_t* sin) {
  STD_TORCH_CHECK(positions.scalar_type() == torch::headeronly::ScalarType::Long && positions.dim() == 2 &&
                      frequencies.scalar_type() == torch::headeronly::ScalarType::Float,
                  "int64 positions [B, T] and float32 frequencies are wanted");
  const Tensor where = in_order(positions), turns = in_order(frequencies);
  const int64_t half = frequencies.numel();
  const auto* at = static_cast<const int64_t*>(where.const_data_ptr());
  const auto* frequency = static_cast<const float*>(turns.const_data_ptr());
  const auto put = [&](uint16_t* to, double value) {
    store(to, all(static_cast<float>(value) * static_cast<float>(scale)), 1);
    to[half] = to[0];
  };
  share_out(positions.numel(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++)
      for (int64_t i = 0; i < half; i++) {
        const double angle = static_cast<float>(at[token]) * frequency[i];
        put(cos + token * 2 * half + i, std::cos(angle)), put(sin + token * 2 * half + i, std::sin(angle));
      }
  });
}

}  // namespace
