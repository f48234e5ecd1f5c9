// Sixteen numbers at once, one for each output channel of a strip: `Floats`, and `Words` of four bytes.
//
// They are a register of AVX-512 or two of AVX2. What the kernels need of either is in lanes512.h and lanes256.h, under
// the same names and with the same results; a processor with half the registers, half as wide, differs in one more
// thing: it cannot hold a block of weights, and reads its words when they are wanted, for one strip at a time (`HELD`).
//
// Every sum is taken in the same order on both, so that a norm or a rounded activation is the same to the bit.
//
// The instructions are described in Intel's Intrinsics Guide.
//
// Read next: threads.h.

#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LANES = 16;  // output channels of a strip

}  // namespace

#ifdef __AVX512F__
#include "lanes512.h"
#else
#include "lanes256.h"
#endif

namespace {

// The two bfloat16 of each word, as float32.
inline Floats low_half(Words pairs) { return as_floats(pairs << 16); }
inline Floats high_half(Words pairs) { return as_floats(pairs & all(static_cast<int32_t>(0xffff0000))); }

// Words of memory, loaded in the order of the source where that matters.
#ifndef AXON_IN_TURN
inline Words words_in_turn(const void* p) { return words_at(p); }
#endif

// The lower and the upper half of each byte, as bytes.
inline Words low_halves(Words w) { return w & all(0x0f0f0f0f); }
#ifndef AXON_HIGH_HALVES
inline Words high_halves(Words w) { return low_halves(w >> 4); }
#endif

// The nearest bfloat16, ties to even; what is not a number stays so.
inline Floats rounded(Floats values) {
  const Words bits = as_words(values), odd = (bits >> 16) & all(1);
  const Words sum = where_no_number(values, all(0x7fc00000), bits + (odd + all(0x7fff)));
  return as_floats(sum & all(static_cast<int32_t>(0xffff0000)));
}

// The first `left` of sixteen results.
#ifndef AXON_STORE
inline void store(uint16_t* y, Floats values, int64_t left) { put_shorts(y, as_words(rounded(values)) >> 16, left); }
#endif

// Sixteen rows of sixteen words, turned: `count` of the columns, one after the other.
template <class Row>
inline void lay_turned(void* to, int64_t count, const Row& row) {
  Words words[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; i++) words[i] = row(i);
  turn(words);
#pragma GCC unroll 16
  for (int64_t i = 0; i < count; i++) put(static_cast<uint8_t*>(to) + 64 * i, words[i]);
}

// e to the power of x: 2^n times a polynomial in what remains, to about float32's last bit.
inline Floats exponential(Floats x) {
  x = larger(all(-104.0f), x);  // in this order: what is not a number stays so
  const Floats n = whole(x * all(1.44269504f));
  Floats r = fnma(n, all(0.693145752f), x);  // ln 2 in two parts
  r = fnma(n, all(1.42860677e-6f), r);
  Floats p = all(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, all(c));
  return times_power(p, n);
}

// 2 to the power of x, to 3 · 10⁻⁶: for what becomes bfloat16. The polynomial is the best of its degree between 0
// and 1.
inline Floats power_of_two(Floats x) {
  if constexpr (!HELD) x = larger(all(-151.0f), x);  // infinity has no fraction there; what is not a number stays so
  const Floats r = fraction(x);
  Floats p = all(0.0135341678f);
  for (float c : {0.0520114601f, 0.241442755f, 0.693003833f, 1.00000262f}) p = fma(p, r, all(c));
  return times_power_below(p, x);
}

// The largest magnitude of some activations. Compared as integers: in that order what is not a number is larger than
// any number, and shows in the result instead of being lost.
class Largest {
 public:
  void add(Floats x) { most_ = larger(most_, as_words(x) & all(0x7fffffff)); }
  float value() const { return std::bit_cast<float>(largest(most_)); }

 private:
  Words most_ = as_words(all(1e-20f));  // rows of zeros have a scale too
};

}  // namespace
