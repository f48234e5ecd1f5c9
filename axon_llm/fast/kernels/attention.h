// The products of attention, for a piece of 64 positions at a time: queries with keys, and scores' weights with values.
//
// Keys are strips whose channels are the positions, so that scores come 16 positions to a register; values are strips
// whose channels are the head's. Values' products are those of linear layers, scores are summed in an order of their
// own. Few rows take keys and values as they lie in the cache, many lay them in strips first: the results are the same
// to the last bit.
//
// Legend: D head_dim; a *row* is one query head of one token
//
// Read next: attend.h.

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
// `AsTheyLie`.
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
      fetch(ahead, 2 * length);
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
      fetch(ahead, 2 * length);
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

// The same for few rows, with keys and values as they lie in the cache: memory is read from front to back, and what
// other rows want again is in a cache by then.
//
// Four rows' queries share a register, a quarter each: four words of every row. A key's four words, spread to all
// quarters, are multiplied by those of four rows at once.
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

  // Half of what comes after the values is told here: all of it in `add` is more than a core waits for at once.
  void meanwhile(const Piece& v, int64_t r) const {
    const int64_t share = PIECE / 2 / a_.rows;
    tell(v, r * share, share);
  }

  void add(const Activations& weights, const Piece& v, Floats* sums) const {
    if (!v.whole()) return Strips::add(weights, v, sums);
    add_values(v, weights.words, a_.rows, sums);
  }

 private:
  static constexpr int64_t QUARTER = 8;              // channels, in four words
  static constexpr int64_t QUERIES = Format::WORDS;  // words that four rows have for them

  Memory queries_{nullptr, &std::free};  // [⌈R / 4⌉, D / QUARTER, QUERIES]

  // The processor is told of a few positions of what comes next, as if they lay side by side. On Zen 3, with AVX2,
  // looking at 8,000 positions takes 1.2 to 1.5 times as long as reading them, and 1.6 to 2.6 without; into the nearest
  // cache the same or a little more. Zen 5 takes 1.1 times as long without, and Zen 4 up to 1.25 times; past the second
  // level Zen 4 takes 1.3 times as long. Intel without its matrix unit has not been timed.
  static void tell(const Piece& piece, int64_t first, int64_t count) {
    [[maybe_unused]] const auto* from = reinterpret_cast<const uint8_t*>(piece.next + first * piece.D);
    [[maybe_unused]] const int64_t bytes = 2 * count * piece.D;
#if defined(__AVX512VP2INTERSECT__)
    fetch<_MM_HINT_NTA>(from, bytes);
#elif defined(AXON_ZEN4) || !defined(__AVX512F__)
    fetch<_MM_HINT_T1>(from, bytes);
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
        if (first) tell(k, s + 4 * four, 4);
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
      tell(v, PIECE / 2 + s / 2, STEP / 2);
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

#ifdef AXON_TILES
// The same by the matrix unit, which takes values as they lie: a tile is 16 positions of 32 channels. To the unit two
// channels beside each other are a pair whose products it adds up, so each row of weights goes in twice, with a zero
// beside each weight: before it for the odd channels, behind it for the even ones. Eight rows are a tile, the even
// channels' sums in its upper half.
class ByTiles : public TilePairs {
 public:
  static constexpr size_t SCORED = 1;

  static int64_t places(int64_t R) { return round_up(R, TILE); }
  static int64_t sums(int64_t rows, int64_t D) { return pieces_of(D, INPUTS) * 2 * rows; }
  static int64_t words(int64_t rows) { return PIECE / TILE * 2 * rows * WORDS; }

  ByTiles(const Activations& a, int64_t R, int64_t D, uint8_t* room) : a_(a), R_(R), D_(D), room_(room) {
    if (R > TILE || D % INPUTS != 0) return;
    turned_ = memory(D / INPUTS * TILE * TILE);
    for (int64_t b = 0; b < D / INPUTS; b++)
      lay_turned(turned_.get() + b * TILE * TILE, TILE,
                 [&](int64_t r) { return words_at(a.words + (b * TILE + r) * TILE); });
  }

  void score(const Piece& k, Floats* scores) const {
    const int64_t blocks = pieces_of(k.D, INPUTS);
    if (turned_ != nullptr && k.whole()) return score_few(k, blocks, scores);
    lay_keys(k.from, k.stride, k.count, k.D, room_);
    std::fill(scores, scores + PIECE / 16 * a_.rows, all(0.0f));
    const auto* ahead = reinterpret_cast<const uint8_t*>(k.next);
    const uint8_t* p = room_;
    for (int64_t s = 0; s < PIECE; s += 32, p += 2 * blocks * BYTES, ahead += 2 * blocks * BYTES) {
      fetch(ahead, 2 * blocks * BYTES);
      tile_products<TilePairs>(a_.words, a_.rows * WORDS * 4, a_.rows, {{p, p + blocks * BYTES}}, 2, blocks,
                               reinterpret_cast<int32_t*>(scores + s / 16 * a_.rows), a_.rows * LANES, true);
    }
  }

  void put_weights(int32_t* words, int64_t r, int64_t s, Floats p) const {
    int32_t* even = words + (s / TILE * 2 * a_.rows + place(r)) * WORDS;
    const Words bits = as_words(rounded(p));
    put(even, bits >> 16), put(even + ODD * WORDS, bits);
  }

  // The values that are wanted next, not those of the next piece: that would be too early.
  void meanwhile(const Piece& v, int64_t r) const {
    const int64_t share = 2 * PIECE * v.D / R_;
    fetch(reinterpret_cast<const uint8_t*>(v.from) + r * share, share);
  }

  void add(const Activations& weights, const Piece& v, Floats* sums) const {
    const bool whole = v.whole();
    const int64_t blocks = pieces_of(v.D, INPUTS), line = whole ? 2 * v.stride : 64 * blocks;
    if (!whole)  // copied, with zeros to the end
      for (int64_t s = 0; s < PIECE; s++)
        for (int64_t b = 0; b < blocks; b++) {
          const int64_t d = b * INPUTS, left = s < v.count ? v.D - d : 0;
          put(room_ + s * line + 64 * b, shorts_at(v.from + s * v.stride + d, left));
        }
    const uint8_t* from = whole ? reinterpret_cast<const uint8_t*>(v.from) : room_;
    const int64_t rows = 2 * a_.rows, used = 2 * round_up(R_, ODD);
    for (int64_t b = 0; b < blocks; b += 2, from += 128)
      tile_products<TilePairs>(weights.words, rows * WORDS * 4, used, {{from, from + 64}, line, TILE * line},
                               std::min<int64_t>(2, blocks - b), PIECE / TILE,
                               reinterpret_cast<int32_t*>(sums + b * rows), rows * LANES, true);
  }

  void scale(Floats* sums, int64_t r, Floats by) const {
    for (Floats* here = sums + place(r); here < sums + ByTiles::sums(a_.rows, D_); here += 2 * a_.rows)
      here[0] = here[0] * by, here[ODD] = here[ODD] * by;
  }
  void finish(const Floats* sums, int64_t r, Floats by, uint16_t* out) const {
    const Floats* here = sums + place(r);
    for (int64_t d = 0; d < D_; d += INPUTS, here += 2 * a_.rows) {
      const Words even = as_words(rounded(here[0] * by)), odd = as_words(rounded(here[ODD] * by));
      put_shorts_at(out + d, (even >> 16) | odd, D_ - d);
    }
  }

 private:
  static constexpr int64_t ODD = 8;  // places from a row's even channels to its odd ones
  static int64_t place(int64_t r) { return r / ODD * TILE + r % ODD; }

  // Up to 16 rows with keys as they lie in the cache: a tile of 16 keys times the turned queries are the scores'
  // columns, which are turned back. For so few rows that is less work than laying keys in strips. The products and the
  // order of their sums are the same.
  void score_few(const Piece& k, int64_t blocks, Floats* scores) const {
    constexpr int64_t TILE_BYTES = TILE * 64, BEFORE = 2 * TILE_BYTES;  // the beginning of the next is under way then
    alignas(64) float columns[PIECE][TILE];
    const auto keys = [&](int64_t tile, int64_t b) { return k.from + tile * TILE * k.stride + b * INPUTS; };
    const auto* ahead = reinterpret_cast<const uint8_t*>(k.next) - BEFORE;
    const int64_t line = 2 * k.stride;
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t b = 0; b < blocks; b++, ahead += 4 * TILE_BYTES) {
      _tile_loadd(6, turned_.get() + b * TILE * WORDS, 64);
      fetch(ahead, TILE_BYTES);
      _tile_loadd(4, keys(0, b), line);
      _tile_dpbf16ps(0, 4, 6);
      fetch(ahead + TILE_BYTES, TILE_BYTES);
      _tile_loadd(5, keys(1, b), line);
      _tile_dpbf16ps(1, 5, 6);
      fetch(ahead + 2 * TILE_BYTES, TILE_BYTES);
      _tile_loadd(4, keys(2, b), line);
      _tile_dpbf16ps(2, 4, 6);
      fetch(ahead + 3 * TILE_BYTES, TILE_BYTES);
      _tile_loadd(5, keys(3, b), line);
      _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, columns[0], 64);
    _tile_stored(1, columns[TILE], 64);
    _tile_stored(2, columns[2 * TILE], 64);
    _tile_stored(3, columns[3 * TILE], 64);
    for (int64_t s = 0; s < PIECE; s += TILE, scores += TILE)
      for (int64_t r = 0; r < R_; r += 4) turn_four(&columns[s][r], TILE, scores + r);
  }

  const Activations& a_;
  const int64_t R_, D_;
  uint8_t* const room_;
  Memory turned_{nullptr, &std::free};
};
#endif

}  // namespace
