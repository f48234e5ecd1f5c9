// The products of attention, for a piece of 64 positions at a time: queries with keys, and scores' weights with values.
//
// Products are those of linear layers: keys are strips whose channels are the positions, so that scores come 16
// positions to a register, and values are strips whose channels are the head's. Few rows take both as they lie in the
// cache and turn or pair up what they need in registers; many lay them in strips first.
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

// A block of keys as multiply() wants it: 32 channels of 16 positions, turned in registers.
class Turned {
 public:
  Turned(const uint16_t* k, int64_t stride) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; i++) words_[i] = words_at(k + i * stride);
    turn(words_);
  }
  Words word(int, int i) const { return words_[i]; }
  const Turned& again() const { return *this; }

 private:
  Words words_[16];
};

// The blocks of two strips of values: 32 positions of 32 channels, paired up when they are wanted, in order. With each
// pair some of what lies `ahead` is fetched: evenly, for the processor can only wait for so much at a time.
class PairedUp {
 public:
  PairedUp(const uint16_t* v, int64_t stride, const uint8_t* ahead) : next_(v), ahead_(ahead), stride_(stride) {}
  Words word(int s, int) const {
    if (s == 1) return high_;
    const Words even = words_at(next_), odd = words_at(next_ + stride_);
    Words low;
    next_ += 2 * stride_;
    fetch<_MM_HINT_NTA>(ahead_, 64);
    ahead_ += 64;
    asm volatile("" : "+r"(next_), "+r"(ahead_));  // or GCC computes all addresses beforehand, and has no registers
    pair_up(now(even), now(odd), low, high_);
    return low;
  }

 private:
  mutable const uint16_t* next_;
  mutable const uint8_t* ahead_;
  const int64_t stride_;
  mutable Words high_;
};

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
  static constexpr int64_t FEW = HELD ? 8 : 0;  // rows: for more, values would be paired up more than twice

  // Places for R rows; registers for their sums; words for their weights.
  static int64_t places(int64_t R) { return R; }
  static int64_t sums(int64_t rows, int64_t D) { return strips(D) * rows; }
  static int64_t words(int64_t rows) { return PIECE / Format::INPUTS * rows * Format::WORDS; }

  ByVectors(const Activations& a, int64_t, int64_t D, uint8_t* room) : a_(a), D_(D), room_(room) {}

  // scores [PIECE / 16, rows] of a piece.
  void score(const Piece& k, Floats* scores) const {
    const int64_t blocks = pieces_of(k.D, Format::INPUTS), rows = a_.rows;
    std::fill(scores, scores + PIECE / 16 * rows, all(0.0f));
    if (rows <= FEW && k.whole())
      for (int64_t s = 0; s < PIECE; s += 16, scores += rows)
        for (int64_t b = 0; b < blocks; b++) {
          fetch<_MM_HINT_NTA>(reinterpret_cast<const uint8_t*>(k.next) + (s / 16 * blocks + b) * 1024, 1024);
          multiply_rows<Format>(Turned(k.from + s * k.stride + b * Format::INPUTS, k.stride), a_, b * rows, rows,
                                scores);
        }
    else {
      lay_keys(k.from, k.stride, k.count, k.D, room_);
      add_strips(a_, blocks, PIECE / 16, scores, k.next);
    }
  }

  // Sixteen weights of row r, for positions s and up of a piece.
  void put_weights(int32_t* words, int64_t r, int64_t s, Floats p) const {
    ::put_weights(*this, words, a_.rows, r, s, p);
  }

  // While row r's scores become weights, some of the next values are fetched: the first half of them, in all.
  void meanwhile(const Piece& v, int64_t r) const {
    const int64_t share = PIECE * v.D / a_.rows;
    if (a_.rows <= FEW) fetch<_MM_HINT_NTA>(reinterpret_cast<const uint8_t*>(v.next) + r * share, share);
  }

  // sums [strips, rows] += the scores' weights times a piece.
  void add(const Activations& weights, const Piece& v, Floats* sums) const {
    constexpr int64_t blocks = PIECE / Format::INPUTS;
    const int64_t rows = a_.rows;
    if (rows <= FEW && v.whole())
      for (int64_t d = 0; d < v.D; d += 32, sums += 2 * rows) {
        const auto both = [&](int64_t b) {
          const auto* ahead = reinterpret_cast<const uint8_t*>(v.next) + PIECE * v.D + (d / 32 * blocks + b) * 1024;
          return PairedUp(v.from + b * Format::INPUTS * v.stride + d, v.stride, ahead);
        };
        multiply_rows_by_two<Format>(both, blocks, weights, 0, rows, sums, rows);
      }
    else {
      lay_values(v.from, v.stride, v.count, v.D, room_);
      add_strips(weights, blocks, strips(v.D), sums, v.next);
    }
  }

  // Row r's sums, times a factor; and as results.
  void scale(Floats* sums, int64_t r, Floats by) const {
    for (int64_t i = 0; i < strips(D_); i++) sums[i * a_.rows + r] = sums[i * a_.rows + r] * by;
  }
  void finish(const Floats* sums, int64_t r, Floats by, uint16_t* out) const {
    for (int64_t i = 0; i < strips(D_); i++) store(out + 16 * i, sums[i * a_.rows + r] * by, D_ - 16 * i);
  }

 private:
  static int64_t strips(int64_t D) { return round_up(D, 32) / 16; }

  // sums [count, rows] += rows times an even number of strips, one after the other in `room`.
  void add_strips(const Activations& a, int64_t blocks, int64_t count, Floats* sums, const uint16_t* next) const {
    const int64_t length = blocks * Format::BYTES;
    const auto* ahead = reinterpret_cast<const uint8_t*>(next);
    const uint8_t* p = room_;
    for (int64_t strip = 0; strip < count; strip += 2, p += 2 * length, ahead += 2 * length, sums += 2 * a.rows) {
      fetch(ahead, 2 * length);
      if constexpr (HELD) {
        const auto both = [&](int64_t b) {
          return Beside<Format>(p + b * Format::BYTES, p + length + b * Format::BYTES);
        };
        multiply_rows_by_two<Format>(both, blocks, a, 0, a.rows, sums, a.rows);
      } else
        for (int64_t s = 0; s < 2; s++)
          for (int64_t b = 0; b < blocks; b++)
            multiply_rows<Format>(typename Format::Block(p + s * length + b * Format::BYTES), a, b * a.rows, a.rows,
                                  sums + s * a.rows);
    }
  }

  const Activations& a_;
  const int64_t D_;
  uint8_t* const room_;
};

#ifdef AXON_TILES
// The same by the matrix unit, which takes values as they lie: a tile is 16 positions of 32 channels. To the unit two
// channels beside each other are a pair whose products it adds up, so each row of weights goes in twice, with a zero
// beside each weight: before it for the odd channels, behind it for the even ones. Eight rows are a tile, the even
// channels' sums in its upper half.
class ByTiles : public TilePairs {
 public:
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
