// The products of attention by the matrix unit, which takes values as they lie: a tile is 16 positions of 32 channels.
// To the unit two channels beside each other are a pair whose products it adds up, so each row of weights goes in
// twice, with a zero beside each weight: before it for the odd channels, behind it for the even ones. Eight rows are a
// tile, the even channels' sums in its upper half.
//
// Legend: D head_dim; a *row* is one query head of one token
//
// Read next: attend.h.

#pragma once

#include "attention.h"

namespace {

#ifdef AXON_TILES

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
      prefetch(ahead, 2 * blocks * BYTES);
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
    prefetch(reinterpret_cast<const uint8_t*>(v.from) + r * share, share);
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
      prefetch(ahead, TILE_BYTES);
      _tile_loadd(4, keys(0, b), line);
      _tile_dpbf16ps(0, 4, 6);
      prefetch(ahead + TILE_BYTES, TILE_BYTES);
      _tile_loadd(5, keys(1, b), line);
      _tile_dpbf16ps(1, 5, 6);
      prefetch(ahead + 2 * TILE_BYTES, TILE_BYTES);
      _tile_loadd(4, keys(2, b), line);
      _tile_dpbf16ps(2, 4, 6);
      prefetch(ahead + 3 * TILE_BYTES, TILE_BYTES);
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
