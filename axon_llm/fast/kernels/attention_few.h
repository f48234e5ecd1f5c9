// The products of attention for few rows, with keys and values as they lie in the cache: memory is read from front to
// back, and what other rows want again is in a cache by then. The results are those of attention.h to the last bit.
//
// Four rows' queries share a register, a quarter each: four words of every row. A key's four words, spread to all
// quarters, are multiplied by those of four rows at once.
//
// Legend: D head_dim; a *row* is one query head of one token
//
// Read next: attention_tiles.h.

#pragma once

#include "attention.h"

namespace {

// What four rows' queries have for four words of keys; sums + those times the words, in every quarter of a register.
struct WideQueries {
  Floats even, odd;
};
inline WideQueries queries_at(const WidePairs&, const int32_t* queries) {
  return {floats_at(queries), floats_at(queries + LANES)};
}
inline Floats add_keys(const WidePairs&, Floats sums, Words keys, const WideQueries& queries) {
  return fma(high_half(keys), queries.odd, fma(low_half(keys), queries.even, sums));
}

// A block's words of a row's queries, the i-th four, as a quarter of what `add_keys` wants.
inline void put_queries(const WidePairs&, const int32_t* words, int64_t i, int32_t* quarter) {
  for (int64_t w = 0; w < 4; w++)
    for (int64_t half = 0; half < 2; half++) quarter[half * LANES + w] = words[2 * (4 * i + w) + half];
}

// sums [⌈D / 16⌉, rows] of ROWS rows += their weights `x` times 32 positions of some of `left` channels, in the order
// of WidePairs. Returns the number of channels.
template <int ROWS>
inline int64_t add_block(const WidePairs&, const uint16_t* v, int64_t stride, int64_t, const int32_t* x, int64_t rows,
                         Floats* sums) {
  constexpr int LAST = HELD ? 1 : 0;
  const auto* weights = reinterpret_cast<const float*>(x);
  Floats parts[ROWS][2][LAST + 1];  // of even channels, of odd ones
#pragma GCC unroll 4
  for (auto& row : parts)
#pragma GCC unroll 2
    for (auto& part : row) part[0] = all(0.0f), part[LAST] = all(0.0f);
#pragma GCC unroll 2
  for (int64_t i = 0; i < WidePairs::INPUTS; i += 2)
#pragma GCC unroll 2
    for (int turn = 0; turn < 2; turn++, v += stride) {
      const Words both = words_at(v);
      const Floats even = low_half(both), odd = high_half(both);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const Floats weight = all(weights[r * WidePairs::WORDS + i + turn]);
        const int part = turn == 0 ? 0 : LAST;
        parts[r][0][part] = now(fma(even, weight, parts[r][0][part]));
        parts[r][1][part] = now(fma(odd, weight, parts[r][1][part]));
      }
    }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    const auto total = [&](int i) { return LAST == 0 ? parts[r][i][0] : parts[r][i][0] + parts[r][i][LAST]; };
    Floats low, high;
    zip(total(0), total(1), low, high);
    sums[r] = sums[r] + low, sums[rows + r] = sums[rows + r] + high;
  }
  return 32;
}

#ifdef AXON_PAIRS
inline Words queries_at(const Pairs&, const int32_t* queries) { return now(words_at(queries)); }
inline Floats add_keys(const Pairs&, Floats sums, Words keys, Words queries) { return add_pairs(sums, queries, keys); }

inline void put_queries(const Pairs&, const int32_t* words, int64_t i, int32_t* quarter) {
  std::copy_n(words + 4 * i, 4, quarter);
}

// Of HALVES times 32 channels. A sum has two parts, to which words go by turns: one part after the other where there
// are no registers for both.
template <int ROWS, int HALVES>
inline void add_channels(const uint16_t* v, int64_t stride, const int32_t* x, int64_t rows, Floats* sums) {
  constexpr int AT_ONCE = ROWS > 2 ? 1 : 2;
  Floats parts[ROWS][2 * HALVES][2];
#pragma GCC unroll 2
  for (int first = 0; first < 2; first += AT_ONCE) {
#pragma GCC unroll 4
    for (auto& row : parts)
#pragma GCC unroll 4
      for (auto& part : row)
#pragma GCC unroll 2
        for (int turn = first; turn < first + AT_ONCE; turn++) part[turn] = all(0.0f);
#pragma GCC unroll 1
    for (int64_t i = 0; i < Pairs::WORDS; i += 2)
#pragma GCC unroll 2
      for (int turn = first; turn < first + AT_ONCE; turn++)
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; h++) {
          const uint16_t* from = v + 2 * (i + turn) * stride + 32 * h;
          Words pairs[2];
          pair_up(words_at(from), words_at(from + stride), pairs[0], pairs[1]);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) {
              Floats& part = parts[r][2 * h + p][turn];
              part = add_pairs(part, pairs[p], all(x[r * Pairs::WORDS + i + turn]));
            }
        }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int strip = 0; strip < 2 * HALVES; strip++) {
      Floats& sum = sums[strip * rows + r];
      sum = sum + (parts[r][strip][0] + parts[r][strip][1]);
    }
}
template <int ROWS>
inline int64_t add_block(const Pairs&, const uint16_t* v, int64_t stride, int64_t left, const int32_t* x, int64_t rows,
                         Floats* sums) {
  if (left < 64) return add_channels<ROWS, 1>(v, stride, x, rows, sums), 32;
  return add_channels<ROWS, 2>(v, stride, x, rows, sums), 64;
}
#endif

// By the vector unit, for few rows.
template <class Format>
class AsTheyLie : public ByVectors<Format> {
  using Strips = ByVectors<Format>;
  using Strips::a_;

 public:
  static constexpr int64_t FEW = 8;  // rows: for more, values would be paired up more than twice, or four times
  // Keys and values are far apart, and after each change from the one to the other it takes a while until memory
  // delivers.
  static constexpr size_t SCORED = 16;

  AsTheyLie(const Activations& a, int64_t R, int64_t D, uint8_t* room) : Strips(a, R, D, room) {
    if (D % Format::INPUTS != 0) return;
    const int64_t of_four = D / QUARTER * QUERIES, count = pieces_of(R, 4) * of_four;
    queries_ = memory(count);
    std::fill_n(queries_.get(), count, 0);
    for (int64_t r = 0; r < R; r++)
      for (int64_t i = 0; i < D / QUARTER; i++)
        put_queries(*this, a.words + (i / 4 * a.rows + r) * Format::WORDS, i % 4,
                    queries_.get() + r / 4 * of_four + i * QUERIES + r % 4 * 4);
  }

  void score(const Piece& k, Floats* scores) const {
    if (!k.whole()) return Strips::score(k, scores);
    // The queries of heads of 64 or 128 channels stay in registers, if there are as many.
    if constexpr (HELD)
      if (k.D == 8 * QUARTER) return score_by_fours<8>(k, scores);
    if constexpr (HELD && Format::WORDS == 16)
      if (k.D == 16 * QUARTER) return score_by_fours<16>(k, scores);
    score_by_fours<0>(k, scores);
  }

  // Half of what comes after the values is prefetched here: all of it in `add` is more than a core waits for at once.
  void meanwhile(const Piece& v, int64_t r) const {
    const int64_t share = PIECE / 2 / a_.rows;
    prefetch_positions(v, r * share, share);
  }

  void add(const Activations& weights, const Piece& v, Floats* sums) const {
    if (!v.whole()) return Strips::add(weights, v, sums);
    add_values(v, weights.words, a_.rows, sums);
  }

 private:
  static constexpr int64_t QUARTER = 8;              // channels, in four words
  static constexpr int64_t QUERIES = Format::WORDS;  // words that four rows have for them

  Memory queries_{nullptr, &std::free};  // [⌈R / 4⌉, D / QUARTER, QUERIES]

  // A few positions of what comes next are prefetched, as if they lay side by side. On Zen 3, with AVX2,
  // looking at 8,000 positions takes 1.2 to 1.5 times as long as reading them, and 1.6 to 2.6 without; into the nearest
  // cache the same or a little more. Zen 5 takes 1.1 times as long without, and Zen 4 up to 1.25 times; past the second
  // level Zen 4 takes 1.3 times as long. Intel without its matrix unit has not been timed.
  static void prefetch_positions(const Piece& piece, int64_t first, int64_t count) {
    [[maybe_unused]] const auto* from = reinterpret_cast<const uint8_t*>(piece.next + first * piece.D);
    [[maybe_unused]] const int64_t bytes = 2 * count * piece.D;
#if defined(__AVX512VP2INTERSECT__)
    prefetch<_MM_HINT_NTA>(from, bytes);
#elif defined(AXON_ZEN4) || !defined(__AVX512F__)
    prefetch<_MM_HINT_T1>(from, bytes);
#endif
  }

  // Queries stay in registers, QUARTERS of them, or do not.
  template <int64_t QUARTERS>
  void score_by_fours(const Piece& k, Floats* scores) const {
    const int32_t* queries = queries_.get();
    for (int64_t r = 0; r < a_.rows; r += 4, queries += k.D / QUARTER * QUERIES)
      score_four<QUARTERS>(k, queries, std::min<int64_t>(4, a_.rows - r), a_.rows, r == 0, scores + r);
  }

  // Of `count` rows, the task's `first` ones or others. In a call of its own, as the next: there are registers for it
  // then.
  template <int64_t QUARTERS>
  [[gnu::noinline]] static void score_four(const Piece& k, const int32_t* queries, int64_t count, int64_t rows,
                                           bool first, Floats* scores) {
    using Queries = decltype(queries_at(Format(), queries));
    Queries held[QUARTERS > 0 ? QUARTERS : 1];
#pragma GCC unroll 16
    for (int64_t i = 0; i < QUARTERS; i++) held[i] = queries_at(Format(), queries + i * QUERIES);
    const uint16_t* from = k.from;
    for (int64_t s = 0; s < PIECE; s += 16, scores += rows) {
      Floats quarters[4];  // of four positions each: of every row, its scores
#pragma GCC unroll 1
      for (int64_t four = 0; four < 4; four++, from += 4 * k.stride) {
        if (first) prefetch_positions(k, s + 4 * four, 4);
        Floats sums[4];
#pragma GCC unroll 4
        for (auto& sum : sums) sum = all(0.0f);
        const auto add = [&](int64_t d, const Queries& here) {
#pragma GCC unroll 4
          for (int64_t i = 0; i < 4; i++) sums[i] = add_keys(Format(), sums[i], spread(from + i * k.stride + d), here);
        };
        if constexpr (QUARTERS > 0)
#pragma GCC unroll 16
          for (int64_t i = 0; i < QUARTERS; i++) add(i * QUARTER, held[i]);
        else
          for (int64_t d = 0; d < k.D; d += QUARTER) add(d, queries_at(Format(), queries + d / QUARTER * QUERIES));
        quarters[four] = sums_of_four(sums);
      }
      turn_quarters(quarters);
      if (count == 4)  // as most often; of any number GCC makes a call
        std::copy_n(quarters, 4, scores);
      else
        for (int64_t r = 0; r < count; r++) scores[r] = quarters[r];
    }
  }

  // A block of positions after the other, for four, two or one row at a time.
  [[gnu::noinline]] static void add_values(const Piece& v, const int32_t* words, int64_t rows, Floats* sums) {
    constexpr int64_t STEP = Format::INPUTS;
    const uint16_t* from = v.from;
    for (int64_t s = 0; s < PIECE; s += STEP, from += STEP * v.stride, words += rows * Format::WORDS) {
      prefetch_positions(v, PIECE / 2 + s / 2, STEP / 2);
      for (int64_t d = 0, done = 0; d < v.D; d += done)
        for (int64_t r = 0, together; r < rows; r += together) {
          const int32_t* x = words + r * Format::WORDS;
          Floats* here = sums + d / 16 * rows + r;
          const auto add = [&](auto count) {
            together = count;
            done = add_block<count>(Format(), from + d, v.stride, v.D - d, x, rows, here);
          };
          if (HELD && r + 4 <= rows)
            add(std::integral_constant<int, HELD ? 4 : 1>());
          else if (r + 2 <= rows)
            add(std::integral_constant<int, 2>());
          else
            add(std::integral_constant<int, 1>());
        }
    }
  }
};

}  // namespace
