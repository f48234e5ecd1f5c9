// Rotary positions: a head turned in one pass. What a compiler makes of the halves that change places takes ten times
// as long as the arithmetic.

#pragma once

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

}  // namespace
