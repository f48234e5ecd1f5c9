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
    const __mmask16 here = first16(left);
    const __m512 one = load(from + d, left), two = load(from + half + d, left);
    const __m512 first = _mm512_mul_ps(two, load(sin + d, left));
    const __m512 second = _mm512_mul_ps(one, load(sin + half + d, left));
    store(to + d, _mm512_fmsub_ps(one, load(cos + d, left), first), here);
    store(to + half + d, _mm512_fmadd_ps(two, load(cos + half + d, left), second), here);
  }
}

}  // namespace
