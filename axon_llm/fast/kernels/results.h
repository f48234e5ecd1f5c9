// Where a product's sums go, a few strips' at a time: they are results, or what a gate lets through.
//
// Legend: R rows, N output channels, I = N / 2 channels that go through a gate
//
// Read next: linear.h.

#pragma once

#include "strips.h"

namespace {

// Results [R, N], with what is added to them.
template <class Y>
struct Results {
  static constexpr bool BY_TURNS = false;
  Y* y;
  int64_t N;
  const Y* bias = nullptr;      // [N]
  const Y* residual = nullptr;  // [R, N]

  // value(s, r): sixteen channels of the s-th of `strips` strips from the `first` on, of the r-th of `rows` rows from
  // `from` on.
  void take(int64_t first, int64_t strips, int64_t from, int64_t rows, const auto& value) const {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t s = 0; s < strips; s++) put(from + r, (first + s) * LANES, value(s, r));
  }

 private:
  void put(int64_t r, int64_t n, Floats values) const {
    if (bias != nullptr) values = values + load(bias + n, N - n);
    if (residual != nullptr) values = values + load(residual + r * N + n, N - n);
    store(y + r * N + n, values, N - n);
  }
};

template <class Y>
Results<Y> into(Y* y, int64_t N) {
  return {y, N};
}

// silu(gate) * up [R, I] of a gate and what goes through it: strips of the one and of the other come by turns, an even
// number at a time. Results of both are never stored: that would be twice as much as what comes of them, written by
// all threads and read by one. I is a multiple of LANES.
struct Gated {
  static constexpr bool BY_TURNS = true;
  uint16_t* y;
  int64_t N;

  void take(int64_t first, int64_t strips, int64_t from, int64_t rows, const auto& value) const {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t s = 0; s < strips; s += 2) {
        const Floats gate = rounded(value(s, r)), up = rounded(value(s + 1, r));
        const Floats silu = gate / (all(1.0f) + exponential(all(0.0f) - gate));
        store(y + (from + r) * (N / 2) + (first + s) / 2 * LANES, rounded(silu) * up, LANES);
      }
  }
};

}  // namespace
