// The products of attention, for a piece of 64 positions at a time: queries with keys, and scores' weights with values.
//
// Keys are strips whose channels are the positions, so that scores come 16 positions to a register; values are strips
// whose channels are the head's. Values' products are those of linear layers, scores are summed in an order of their
// own.
//
// Legend: D head_dim; a *row* is one query head of one token
//
// Here for any number of rows by the vector unit; the files after this have others.
//
// Read next: attention_few.h.

#pragma once

#include "tiles.h"

namespace {

constexpr int64_t PIECE = 64;  // positions

// Keys [PIECE, D] → strips of 16 positions: [PIECE / 16, blocks, 16 words, 16].
inline void lay_keys(const uint16_t* k, int64_t stride, int64_t count, int64_t D, uint8_t* strips) {
  const int64_t blocks = pieces_of(D, Pairs::INPUTS);
  for (int64_t s = 0; s < PIECE; s += 16)
    for (int64_t b = 0; b < blocks; b++, strips += Pairs::BYTES)
      lay_block(k + s * stride + b * Pairs::INPUTS, stride, count - s, D - b * Pairs::INPUTS, strips);
}

// Values [PIECE, D] → strips of 16 channels: [⌈D / 32⌉ * 2, PIECE / 2 words, 16], two positions to a word.
inline void lay_values(const uint16_t* v, int64_t stride, int64_t count, int64_t D, uint8_t* strips) {
  constexpr int64_t STRIP = PIECE / 2 * 64;  // bytes
  for (int64_t d = 0; d < D; d += 32, strips += 2 * STRIP)
    for (int64_t s = 0; s < PIECE; s += 2) {
      const uint16_t *one = v + s * stride + d, *two = one + stride;
      const bool whole = s + 1 < count && D - d >= 32;
      const Words even = whole ? words_at(one) : shorts_at(one, s < count ? D - d : 0);
      const Words odd = whole ? words_at(two) : shorts_at(two, s + 1 < count ? D - d : 0);
      Words low, high;
      pair_up(even, odd, low, high);
      put(strips + s / 2 * 64, low), put(strips + STRIP + s / 2 * 64, high);
    }
}

// Sixteen weights of row r, for positions s and up of a piece, as words of the format's activations.
inline void put_weights(const Pairs&, int32_t* words, int64_t rows, int64_t r, int64_t s, Floats p) {
  int32_t* block = words + (s / Pairs::INPUTS * rows + r) * Pairs::WORDS;
  store(reinterpret_cast<uint16_t*>(block) + s % Pairs::INPUTS, p, LANES);
}
inline void put_weights(const WidePairs&, int32_t* words, int64_t rows, int64_t r, int64_t s, Floats p) {
  int32_t* block = words + (s / Pairs::INPUTS * rows + r) * WidePairs::WORDS;
  put(reinterpret_cast<float*>(block) + s % Pairs::INPUTS, p);
}

// sums [2, rows] += rows times `blocks` blocks of two strips, one after the other.
template <class Format>
inline void add_strips(const uint8_t* p, int64_t blocks, const Activations& a, Floats* sums) {
  const int64_t length = blocks * Format::BYTES;
  if constexpr (HELD)
    add_two_strips<Format>(p, p + length, blocks, a, 0, a.rows, sums, a.rows);
  else
    for (int64_t s = 0; s < 2; s++)
      for (int64_t b = 0; b < blocks; b++)
        multiply_rows<Format>(typename Format::Block(p + s * length + b * Format::BYTES), a, b * a.rows, a.rows,
                              sums + s * a.rows);
}

// sum + a word of weights, two positions' or two channels', times the numbers that `x` points to: sixteen sums of one
// row.
inline Floats add_word(const WidePairs&, Floats sum, Words w, const int32_t* x) {
  const auto* both = reinterpret_cast<const float*>(x);
  return now(fma(high_half(w), all(both[1]), now(fma(low_half(w), all(both[0]), sum))));
}
#ifdef AXON_PAIRS
inline Floats add_word(const Pairs&, Floats sum, Words w, const int32_t* x) { return add_pairs(sum, w, all(*x)); }
#endif

// scores [2, rows] of ROWS rows, from two strips of keys, in four sums: a block's word i goes to sum i mod 4, as in
// `AsTheyLie` (attention_few.h).
template <class Format, int ROWS>
inline void score_rows(const uint8_t* p, int64_t blocks, const Activations& a, int64_t r, Floats* scores) {
  constexpr int STRIPS = HELD ? 2 : 1;
  constexpr int64_t NUMBERS = Format::WORDS / 16;  // that a word is multiplied by
  const int64_t length = blocks * Format::BYTES;
  for (int64_t strip = 0; strip < 2; strip += STRIPS, p += STRIPS * length, scores += STRIPS * a.rows) {
    Floats sums[4][STRIPS * ROWS];
    for (int turn = 0; turn < 4; turn++) {
      Floats here[STRIPS * ROWS];
#pragma GCC unroll 8
      for (auto& sum : here) sum = all(0.0f);
      for (int64_t b = 0; b < blocks; b++) {
        const uint8_t* w = p + b * Format::BYTES + turn * 64;
        const int32_t* x = a.words + (b * a.rows + r) * Format::WORDS + turn * NUMBERS;
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
          for (int s = 0; s < STRIPS; s++) {
            const Words word = words_at(w + s * length + i * 64);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) {
              Floats& sum = here[s * ROWS + row];
              sum = add_word(Format(), sum, word, x + row * Format::WORDS + i * NUMBERS);
            }
          }
      }
      std::copy_n(here, STRIPS * ROWS, sums[turn]);
    }
    for (int64_t s = 0; s < STRIPS; s++)
      for (int64_t row = 0; row < ROWS; row++) {
        const auto of = [&](int turn) { return sums[turn][s * ROWS + row]; };
        scores[s * a.rows + r + row] = (of(0) + of(2)) + (of(1) + of(3));
      }
  }
}

// A piece of a cache's keys, or of its values: [count, D], `stride` apart; `next` is what is looked at after it.
struct Piece {
  const uint16_t *from, *next;
  int64_t stride, count, D;

  bool whole() const { return count == PIECE && D % Pairs::INPUTS == 0; }
};

// By the vector unit, with a task's queries `a`; strips are laid in `room`.
template <class Format>
class ByVectors : public Format {
 public:
  static constexpr size_t SCORED = 1;  // pieces that are scored before their values are looked at

  // Places for R rows; registers for their sums; words for their weights.
  static int64_t places(int64_t R) { return R; }
  static int64_t sums(int64_t rows, int64_t D) { return strips(D) * rows; }
  static int64_t words(int64_t rows) { return PIECE / Format::INPUTS * rows * Format::WORDS; }

  ByVectors(const Activations& a, int64_t, int64_t D, uint8_t* room) : a_(a), D_(D), room_(room) {}

  // scores [PIECE / 16, rows] of a piece.
  void score(const Piece& k, Floats* scores) const {
    const int64_t blocks = pieces_of(k.D, Format::INPUTS), length = blocks * Format::BYTES;
    lay_keys(k.from, k.stride, k.count, k.D, room_);
    const auto* ahead = reinterpret_cast<const uint8_t*>(k.next);
    const uint8_t* p = room_;
    for (int64_t s = 0; s < PIECE; s += 32, p += 2 * length, ahead += 2 * length, scores += 2 * a_.rows) {
      prefetch(ahead, 2 * length);
      int64_t r = 0;
      for (; r + 4 <= a_.rows; r += 4) score_rows<Format, 4>(p, blocks, a_, r, scores);
      for (; r + 2 <= a_.rows; r += 2) score_rows<Format, 2>(p, blocks, a_, r, scores);
      for (; r < a_.rows; r++) score_rows<Format, 1>(p, blocks, a_, r, scores);
    }
  }

  // Sixteen weights of row r, for positions s and up of a piece.
  void put_weights(int32_t* words, int64_t r, int64_t s, Floats p) const {
    ::put_weights(*this, words, a_.rows, r, s, p);
  }

  // Called while row r's scores become weights: memory has time then.
  void meanwhile(const Piece&, int64_t) const {}

  // sums [strips, rows] += the scores' weights times a piece.
  void add(const Activations& weights, const Piece& v, Floats* sums) const {
    constexpr int64_t blocks = PIECE / Format::INPUTS, length = blocks * Format::BYTES;
    lay_values(v.from, v.stride, v.count, v.D, room_);
    const auto* ahead = reinterpret_cast<const uint8_t*>(v.next);
    const uint8_t* p = room_;
    for (int64_t d = 0; d < v.D; d += 32, p += 2 * length, ahead += 2 * length, sums += 2 * a_.rows) {
      prefetch(ahead, 2 * length);
      add_strips<Format>(p, blocks, weights, sums);
    }
  }

  // Row r's sums, times a factor; and as results.
  void scale(Floats* sums, int64_t r, Floats by) const {
    for (int64_t i = 0; i < strips(D_); i++) sums[i * a_.rows + r] = sums[i * a_.rows + r] * by;
  }
  void finish(const Floats* sums, int64_t r, Floats by, uint16_t* out) const {
    for (int64_t i = 0; i < strips(D_); i++) store(out + 16 * i, sums[i * a_.rows + r] * by, D_ - 16 * i);
  }

 protected:
  const Activations& a_;
  const int64_t D_;
  uint8_t* const room_;

 private:
  static int64_t strips(int64_t D) { return round_up(D, 32) / 16; }
};

}  // namespace
