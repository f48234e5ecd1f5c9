// The products of attention, for a piece of 64 positions at a time: queries with keys, and scores' weights with values.
//
// Products are those of linear layers: keys are strips whose channels are the positions, so that scores come 16
// positions to a register, and values are strips whose channels are the head's. Few rows take both as they lie in the
// cache; many lay them in strips first.
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
  if constexpr (HELD) {
    const auto both = [&](int64_t b) { return Beside<Format>(p + b * Format::BYTES, p + length + b * Format::BYTES); };
    multiply_rows_by_two<Format>(both, blocks, a, 0, a.rows, sums, a.rows);
  } else
    for (int64_t s = 0; s < 2; s++)
      for (int64_t b = 0; b < blocks; b++)
        multiply_rows<Format>(typename Format::Block(p + s * length + b * Format::BYTES), a, b * a.rows, a.rows,
                              sums + s * a.rows);
}

// The same of keys' strips, with sums that begin now: scores.
inline void score_strips(const WidePairs&, const uint8_t* p, int64_t blocks, const Activations& a, Floats* scores) {
  std::fill_n(scores, 2 * a.rows, all(0.0f));
  add_strips<WidePairs>(p, blocks, a, scores);
}

#ifdef AXON_PAIRS
// The pairs in the order of `AsTheyLie`: four sums, by turns.
template <int ROWS>
inline void score_rows(const uint8_t* p, int64_t blocks, const Activations& a, int64_t r, Floats* scores) {
  Floats parts[2][ROWS][4];
#pragma GCC unroll 2
  for (auto& strip : parts)
#pragma GCC unroll 2
    for (auto& row : strip)
#pragma GCC unroll 4
      for (auto& part : row) part = all(0.0f);
  for (int64_t b = 0; b < blocks; b++, p += Pairs::BYTES) {
    const int32_t* x = a.words + (b * a.rows + r) * Pairs::WORDS;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      const Words w[2] = {Pairs::word(p, i), Pairs::word(p + blocks * Pairs::BYTES, i)};
#pragma GCC unroll 2
      for (int row = 0; row < ROWS; row++) {
        const Words pair = all(x[row * Pairs::WORDS + i]);
#pragma GCC unroll 2
        for (int s = 0; s < 2; s++) parts[s][row][i % 4] = add_pairs(parts[s][row][i % 4], w[s], pair);
      }
    }
  }
#pragma GCC unroll 2
  for (int s = 0; s < 2; s++)
#pragma GCC unroll 2
    for (int row = 0; row < ROWS; row++) {
      const auto& four = parts[s][row];
      scores[s * a.rows + r + row] = (four[0] + four[2]) + (four[1] + four[3]);
    }
}
inline void score_strips(const Pairs&, const uint8_t* p, int64_t blocks, const Activations& a, Floats* scores) {
  int64_t r = 0;
  for (; r + 2 <= a.rows; r += 2) score_rows<2>(p, blocks, a, r, scores);
  if (r < a.rows) score_rows<1>(p, blocks, a, r, scores);
}
#endif

// A piece of a cache's keys, or of its values: [count, D], `stride` apart. What is needed `next` has as many.
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
      score_strips(*this, p, blocks, a_, scores);
    }
  }

  // Sixteen weights of row r, for positions s and up of a piece.
  void put_weights(int32_t* words, int64_t r, int64_t s, Floats p) const {
    ::put_weights(*this, words, a_.rows, r, s, p);
  }

  // What can be fetched while row r's scores become weights.
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

#ifdef AXON_PAIRS
// The same for few rows, with keys and values as they lie in the cache, each piece read once from front to back.
//
// Four rows' queries share a register, a quarter each: four words of every row. A key's four words, spread to all
// quarters, are multiplied by those of four rows at once.
class AsTheyLie : public ByVectors<Pairs> {
 public:
  static constexpr int64_t FEW = 8;  // rows: for more, values would be paired up more than four times
  // Keys and values are far apart, and after each change from the one to the other it takes a while until memory
  // delivers.
  static constexpr size_t SCORED = 16;

  AsTheyLie(const Activations& a, int64_t R, int64_t D, uint8_t* room) : ByVectors(a, R, D, room) {
    if (D % INPUTS != 0) return;
    const int64_t quarters = D / QUARTER, count = pieces_of(R, 4) * quarters * LANES;
    queries_ = memory(count);
    std::fill_n(queries_.get(), count, 0);
    for (int64_t r = 0; r < R; r++)
      for (int64_t i = 0; i < quarters; i++)
        std::memcpy(queries_.get() + (r / 4 * quarters + i) * LANES + r % 4 * 4,
                    a.words + (i / 4 * a.rows + r) * WORDS + i % 4 * 4, 16);
  }

  void score(const Piece& k, Floats* scores) const {
    if (!k.whole()) return ByVectors::score(k, scores);
    for (int64_t r = 0; r < a_.rows; r += 4)
      score_four(k, queries_.get() + r / 4 * (k.D / QUARTER) * LANES, std::min<int64_t>(4, a_.rows - r), a_.rows,
                 scores + r);
  }

  void add(const Activations& weights, const Piece& v, Floats* sums) const {
    if (!v.whole()) return ByVectors::add(weights, v, sums);
    add_values(v, weights.words, a_.rows, sums);
  }

 private:
  static constexpr int64_t QUARTER = 8;  // channels, in four words

  Memory queries_{nullptr, &std::free};  // [⌈R / 4⌉, D / QUARTER, 16 words]

  // The processor is told of numbers that are needed soon. Zen 5 was faster so, Zen 4 is not.
  static void tell([[maybe_unused]] const uint16_t* next, [[maybe_unused]] int64_t count) {
#ifdef __AVX512VP2INTERSECT__
    fetch<_MM_HINT_NTA>(reinterpret_cast<const uint8_t*>(next), 2 * count);
#endif
  }

  // Of `count` rows. In a call of its own, as the next: there are registers for it then.
  [[gnu::noinline]] static void score_four(const Piece& k, const int32_t* queries, int64_t count, int64_t rows,
                                           Floats* scores) {
    const uint16_t* from = k.from;
    for (int64_t s = 0; s < PIECE; s += 16, scores += rows) {
      Floats quarters[4];  // of four positions each: of every row, its scores
      for (auto& four : quarters) {
        Floats sums[4];
#pragma GCC unroll 4
        for (auto& sum : sums) sum = all(0.0f);
        const int32_t* words = queries;
        tell(k.next + (from - k.from), 4 * k.D);
        for (int64_t d = 0; d < k.D; d += QUARTER, words += LANES)
#pragma GCC unroll 4
          for (int64_t i = 0; i < 4; i++)
            sums[i] = add_pairs(sums[i], words_at(words), spread(from + i * k.stride + d));
        four = sums_of_four(sums);
        from += 4 * k.stride;
      }
      turn_quarters(quarters);
      for (int64_t r = 0; r < count; r++) scores[r] = quarters[r];
    }
  }

  // A block of positions after the other, of all channels, for two rows at a time.
  [[gnu::noinline]] static void add_values(const Piece& v, const int32_t* words, int64_t rows, Floats* sums) {
    const uint16_t* from = v.from;
    for (int64_t s = 0; s < PIECE; s += INPUTS, from += INPUTS * v.stride, words += rows * WORDS)
      for (int64_t d = 0; d < v.D; d += 64) {
        const bool both = v.D - d > 32;
        tell(v.next + s * v.D + INPUTS * d, INPUTS * std::min<int64_t>(64, v.D - d));
        for (int64_t r = 0; r < rows; r += 2) {
          const bool two = r + 1 < rows;
          const int32_t* x = words + r * WORDS;
          Floats* here = sums + d / 16 * rows + r;
          if (two && both) add_block<2, 2>(from + d, v.stride, x, rows, here);
          if (two && !both) add_block<2, 1>(from + d, v.stride, x, rows, here);
          if (!two && both) add_block<1, 2>(from + d, v.stride, x, rows, here);
          if (!two && !both) add_block<1, 1>(from + d, v.stride, x, rows, here);
        }
      }
  }

  // ROWS rows times a block of 32 positions of HALVES times 32 channels, in the order of Pairs.
  template <int ROWS, int HALVES>
  static inline void add_block(const uint16_t* v, int64_t stride, const int32_t* x, int64_t rows, Floats* sums) {
    Floats parts[ROWS][2 * HALVES][2];
#pragma GCC unroll 2
    for (auto& row : parts)
#pragma GCC unroll 4
      for (auto& part : row) part[0] = part[1] = all(0.0f);
#pragma GCC unroll 2
    for (int64_t i = 0; i < WORDS; i += 2)
#pragma GCC unroll 2
      for (int turn = 0; turn < 2; turn++, v += 2 * stride)
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; h++) {
          Words pairs[2];
          pair_up(words_at(v + 32 * h), words_at(v + stride + 32 * h), pairs[0], pairs[1]);
#pragma GCC unroll 2
          for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++)
              parts[r][2 * h + p][turn] = add_pairs(parts[r][2 * h + p][turn], pairs[p], all(x[r * WORDS + i + turn]));
        }
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int strip = 0; strip < 2 * HALVES; strip++) {
        Floats& sum = sums[strip * rows + r];
        sum = sum + (parts[r][strip][0] + parts[r][strip][1]);
      }
  }
};
#endif

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
