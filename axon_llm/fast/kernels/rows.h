// Any number of rows times a block, and times the blocks of two strips.
//
// Read next: tiles.h.

#pragma once

#include "formats.h"

namespace {

// sums += `rows` rows of a block of activations, from place `at` on, times a block of weights. Where it is a call of
// its own the block goes through memory, and integer products are a third slower.
template <class Format>
[[gnu::always_inline]] inline void multiply_rows(const auto& block, const Activations& a, int64_t at, int64_t rows,
                                                 typename Format::Sum* sums) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) Format::template multiply<4>(block.again(), a, at + r, sums + r);
  for (; r + 2 <= rows; r += 2) Format::template multiply<2>(block.again(), a, at + r, sums + r);
  for (; r < rows; r++) Format::template multiply<1>(block.again(), a, at + r, sums + r);
}

// Two strips' sums of ROWS rows, those of the second `apart` from the first's, += the rows from place `at` on times
// `count` blocks of both strips: blocks(0), blocks(1), …
template <class Format, int ROWS>
inline void multiply_by_two(const auto& blocks, int64_t count, const Activations& a, int64_t at,
                            typename Format::Sum* sums, int64_t apart) {
  const int64_t step = a.rows;
  typename Format::Sum here[2 * ROWS];  // in registers, whatever the number of blocks
  std::copy_n(sums, ROWS, here), std::copy_n(sums + apart, ROWS, here + ROWS);
  for (int64_t b = 0; b < count; b++) Format::template multiply<ROWS, 2>(blocks(b), a, at + b * step, here);
  std::copy_n(here, ROWS, sums), std::copy_n(here + ROWS, ROWS, sums + apart);
}

// The same for any number of rows.
template <class Format>
inline void multiply_rows_by_two(const auto& blocks, int64_t count, const Activations& a, int64_t at, int64_t rows,
                                 typename Format::Sum* sums, int64_t apart) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) multiply_by_two<Format, 4>(blocks, count, a, at + r, sums + r, apart);
  for (; r + 2 <= rows; r += 2) multiply_by_two<Format, 2>(blocks, count, a, at + r, sums + r, apart);
  for (; r < rows; r++) multiply_by_two<Format, 1>(blocks, count, a, at + r, sums + r, apart);
}

// … with the blocks of a strip one after the other.
template <class Format>
inline void add_two_strips(const uint8_t* one, const uint8_t* other, int64_t blocks, const Activations& a, int64_t at,
                           int64_t rows, typename Format::Sum* sums, int64_t apart) {
  const auto both = [&](int64_t i) { return Beside<Format>(one + i * Format::BYTES, other + i * Format::BYTES); };
  multiply_rows_by_two<Format>(both, blocks, a, at, rows, sums, apart);
}

}  // namespace
