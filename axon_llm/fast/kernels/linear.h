// Linear layers: rows of activations times a weight, whatever it is.
//
// Read next: linear.cpp, attention.h.

#pragma once

#include "results.h"
#include "weights.h"

namespace {

// Rows from which int4 weights are widened to bfloat16 for the matrix unit; activations need no rounding then.
constexpr int64_t WIDENED_ROWS = 64;
// Rows up to which a weight as it lies in a checkpoint is multiplied where it lies; for more it is laid in strips. So
// many sum up in the same order, and a pass that verifies drafts finds what one row would. With 8 rows Zen 4 reads at
// 11 to 13 GB/s, for activations are as large as the nearest cache; laid in strips at 18 to 20.
constexpr int64_t STORED_ROWS = HELD ? 8 : 2;
// What is taken together of many rows: strips, and blocks of each.
constexpr int64_t MANY_STRIPS = 8, MANY_BLOCKS = 32;
// Sums of few rows that are kept and become results together: what they are added to, and where they go, is in no
// cache, and waiting for it strip by strip makes int4 at one row 1.5 % slower (Intel with AMX). Of strips that come by
// turns so many are read in the order of memory.
constexpr int64_t KEPT = 64;
// What the matrix unit takes together, so that activations, weights and sums stay in the second-level cache.
constexpr int64_t TILE_ROWS = 512, TILE_BLOCKS = 8, TILE_STRIPS = 32;

// The least a thread takes of a weight of `count` parts and `bytes` in all: half of a small one, for taking pieces
// would cost it more than waiting for the other threads.
inline int64_t least(int64_t count, int64_t bytes) {
  constexpr int64_t SMALL = 4 << 20, LEAST = 128 << 10;
  return bytes < SMALL ? pieces_of(count, torch::stable::get_num_threads()) : pieces_of(LEAST * count, bytes);
}

// sums of several rows += those from place `at` on, times blocks one after the other. Blocks AHEAD are prefetched
// too if `prefetched`, which is a constant where that is faster.
template <class Format>
inline void add_to_several(auto prefetched, const uint8_t* p, int64_t blocks, const Activations& a, int64_t at,
                           int64_t rows, typename Format::Sum* sums) {
  for (int64_t b = 0; b < blocks; b++, p += Format::BYTES, at += a.rows) {
    typename Format::Block block(p, prefetched);  // not const: GCC would store it, though nobody reads it
    multiply_rows<Format>(block, a, at, rows, sums);
  }
}
// The same for ROWS rows, whose sums stay in registers; each line of a block is multiplied by all before the next.
template <class Format, int ROWS>
inline void add_in_turn(const uint8_t* p, int64_t blocks, const Activations& a, int64_t at,
                        typename Format::Sum* sums) {
  static_assert(ROWS == 1 || !SHARED<Format>, "words of a shared line would be wanted in another order");
  typename Format::Sum here[ROWS];
  std::copy_n(sums, ROWS, here);
  for (int64_t b = 0; b < blocks; b++, p += Format::BYTES, at += a.rows) {
    if constexpr (ROWS == 1 && ALONE_AHEAD > 0) prefetch<ALONE_INTO>(p + ALONE_AHEAD, Format::BYTES);
    Format::template multiply<ROWS>(typename Format::AtOnce(p), a, at, here);
  }
  std::copy_n(here, ROWS, sums);
}
// … for any number of rows from one on.
template <class Format>
inline void add_blocks(const uint8_t* p, int64_t blocks, const Activations& a, int64_t at, int64_t rows,
                       typename Format::Sum* sums) {
  if (rows == 1) return add_in_turn<Format, 1>(p, blocks, a, at, sums);
  const bool prefetched = rows >= Format::PREFETCH_ROWS;
  if constexpr (!HELD) return add_to_several<Format>(prefetched, p, blocks, a, at, rows, sums);
  if constexpr (Format::PREFETCH_ROWS > 4)
    if (rows == 4) return add_in_turn<Format, 4>(p, blocks, a, at, sums);
  if (prefetched) return add_to_several<Format>(std::true_type(), p, blocks, a, at, rows, sums);
  return add_to_several<Format>(std::false_type(), p, blocks, a, at, rows, sums);
}

// One row's sums of two strips += it times their blocks, read from both side by side.
template <class Format>
inline void add_beside(const uint8_t* const* w, int64_t blocks, const Activations& a, typename Format::Sum* sums) {
  static_assert(!ALONE_BY_TWO || ALONE_INTO == _MM_HINT_T1, "it is where `Beside` prefetches to");
  const auto both = [&](int64_t i) { return Beside<Format, true>(w[0] + i * Format::BYTES, w[1] + i * Format::BYTES); };
  multiply_by_two<Format, 1>(both, blocks, a, 0, sums, 1);
}

// x [R, K] times the weights of all strips, which threads share: many rows. Several strips are multiplied by as much of
// some rows as stays in the second-level cache.
template <class Format, class Weights, class X, class Y>
void multiply_many(const X* x, const Weights& weights, const float* scales, const Y& y, int64_t R, int64_t K) {
  const int64_t blocks = pieces_of(K, Format::INPUTS), count = pieces_of(y.N, LANES);
  const int64_t chunk = std::min(blocks, MANY_BLOCKS);
  Activations a(R | 1);  // an odd number: the blocks of a row do not all want the same places of a cache
  Format::prepare(x, R, K, blocks, a);
  share(pieces_of(count, 2), 1, [&](Pieces& pieces) {  // two strips at a time
    const Memory owned = memory(MANY_STRIPS * R * LANES), room = room_for<Weights>(MANY_STRIPS * chunk);
    auto* sums = reinterpret_cast<typename Format::Sum*>(owned.get());  // [MANY_STRIPS, R]
    for (int64_t first, last; pieces.take(first, last);)
      for (int64_t strip = 2 * first, end = std::min(2 * last, count); strip < end; strip += MANY_STRIPS) {
        const int64_t together = std::min(MANY_STRIPS, end - strip);
        for (int64_t s = 0; s < together; s++)
          for (int64_t r = 0; r < R; r++) sums[s * R + r] = Format::first(a, r);
        for (int64_t b = 0; b < blocks; b += chunk) {
          const int64_t taken = std::min(chunk, blocks - b);
          const uint8_t* w[MANY_STRIPS];
          for (int64_t s = 0; s < together; s++)
            w[s] = weights.blocks(strip + s, b, taken, bytes(room) + s * chunk * Weights::MADE);
          for (int64_t from = 0; from < R; from += TOGETHER) {
            const int64_t rows = std::min(TOGETHER, R - from), at = b * a.rows + from;
            int64_t s = 0;
            if constexpr (HELD)
              for (; s + 2 <= together; s += 2)
                add_two_strips<Format>(w[s], w[s + 1], taken, a, at, rows, sums + s * R + from, R);
            for (; s < together; s++) add_blocks<Format>(w[s], taken, a, at, rows, sums + s * R + from);
          }
        }
        y.take(strip, together, 0, R, [&](int64_t s, int64_t r) {
          return Format::finish(sums[s * R + r], a, r, scales_of(weights, scales, strip + s));
        });
      }
  });
}

// The same for any number of rows; few are bound by what memory delivers, so each strip is read from front to back, or
// two are.
template <class Format, class Weights, class X, class Y>
void multiply(const X* x, const Weights& weights, const float* scales, const Y& y, int64_t R, int64_t K) {
  if (R > TOGETHER) return multiply_many<Format>(x, weights, scales, y, R, K);
  const int64_t blocks = pieces_of(K, Format::INPUTS), count = pieces_of(y.N, LANES);
  Activations a(R);
  Format::prepare(x, R, K, blocks, a);
  const int64_t pairs = pieces_of(count, 2), kept = std::max<int64_t>(1, KEPT / (2 * R)) * 2;
  share(pairs, least(pairs, count * blocks * Format::BYTES), [&](Pieces& pieces) {
    const Memory owned = memory(kept * R * LANES), room = room_for<Weights>(2 * blocks);
    auto* sums = reinterpret_cast<typename Format::Sum*>(owned.get());  // [kept, R]
    for (int64_t begin, end; pieces.take(begin, end);)
      for (int64_t strip = 2 * begin, last = std::min(2 * end, count); strip < last; strip += kept) {
        const int64_t together = std::min(kept, last - strip);
        for (int64_t i = 0, now; i < together; i += now) {
          now = ALONE_BY_TWO && R == 1 && i + 1 < together ? 2 : 1;
          const int64_t s = now == 2 ? i : in_memory_order(weights, i, together);
          const uint8_t* w[2];
          for (int64_t j = 0; j < now; j++) {
            w[j] = weights.blocks(strip + s + j, 0, blocks, bytes(room) + j * blocks * Weights::MADE);
            for (int64_t r = 0; r < R; r++) sums[(s + j) * R + r] = Format::first(a, r);
          }
          if (now == 2)
            add_beside<Format>(w, blocks, a, sums + s);
          else
            add_blocks<Format>(w[0], blocks, a, 0, R, sums + s * R);
        }
        y.take(strip, together, 0, R, [&](int64_t s, int64_t r) {
          return Format::finish(sums[s * R + r], a, r, scales_of(weights, scales, strip + s));
        });
      }
  });
}

#ifdef AXON_TILES

// The same by the matrix unit, two strips together: many rows are bound by what the second-level cache delivers, few by
// what memory does, and it delivers a little more from two places at once.
template <class Format, class Weights, class X, class Y>
void multiply_in_tiles(const X* x, const Weights& weights, const float* scales, const Y& y, int64_t R, int64_t K) {
  const int64_t blocks = pieces_of(K, Format::INPUTS), count = pieces_of(y.N, LANES);
  Activations a(tile_rows(R));
  Format::prepare(x, R, K, blocks, a);
  const bool few = a.rows <= 2 * TILE;
  const int64_t rows = std::min(a.rows, TILE_ROWS), chunk = few ? blocks : TILE_BLOCKS;
  // Many rows: as many strips as share what the second-level cache holds of them, unless threads would have no work.
  const int64_t pairs = pieces_of(count, 2), each = pieces_of(pairs, torch::stable::get_num_threads());
  const int64_t at_least = few ? least(pairs, count * blocks * Format::BYTES) : std::min(TILE_STRIPS / 2, each);
  share(pairs, at_least, [&](Pieces& pieces) {
    const Tiles tiles(std::min(R, TILE));
    const Memory sums = memory(TILE_STRIPS * rows * LANES), room = room_for<Weights>(2 * chunk);
    for (int64_t begin, end; pieces.take(begin, end);)
      for (int64_t strip = 2 * begin, last = std::min(2 * end, count); strip < last; strip += TILE_STRIPS) {
        const int64_t together = std::min(TILE_STRIPS, last - strip);
        for (int64_t from = 0; from < a.rows; from += rows) {
          const int64_t here = std::min(rows, a.rows - from);
          for (int64_t b = 0; b < blocks; b += chunk)
            for (int64_t s = 0; s < together; s += 2) {
              const int64_t now = std::min<int64_t>(2, together - s), taken = std::min(chunk, blocks - b);
              Blocks w{};
              for (int64_t i = 0; i < now; i++) {
                auto* to = bytes(room) + i * chunk * Weights::MADE;
                w.from[i] = weights.blocks(strip + s + i, b, taken, to);
              }
              tile_products<Format>(a.words + (b * a.rows + from) * Format::WORDS, a.rows * Format::WORDS * 4, here, w,
                                    now, taken, sums.get() + s * rows * LANES, rows * LANES, b > 0, few);
            }
          y.take(strip, together, from, std::min(here, R - from), [&](int64_t s, int64_t r) {
            return Format::finish_tile(sums.get() + (s * rows + r) * LANES, a, from + r,
                                       scales_of(weights, scales, strip + s));
          });
        }
      }
  });
}

#endif

// bfloat16 weights, from wherever they are.
template <class Weights, class Y>
void multiply_bf16(const uint16_t* x, const Weights& weights, const Y& y, int64_t R, int64_t K, int64_t products) {
#ifdef AXON_TILES
  if (products == TILES && tiles_allowed()) return multiply_in_tiles<TilePairs>(x, weights, nullptr, y, R, K);
#endif
#ifdef AXON_PAIRS
  if (products != WIDE) return multiply<Pairs>(x, weights, nullptr, y, R, K);
#endif
  multiply<WidePairs>(x, weights, nullptr, y, R, K);
}

// The sum of the products of two rows of bfloat16, in four parts: none waits for another. `first`: nobody has read b
// before; what comes next is prefetched where that is faster with AVX2, elsewhere that has not been timed.
inline float dot(const uint16_t* a, const uint16_t* b, int64_t K, bool wide, [[maybe_unused]] bool first) {
  Floats parts[4];
  for (auto& part : parts) part = all(0.0f);
  for (int64_t k = 0; k < K; k += 128) {
    if constexpr (!HELD && ALONE_AHEAD > 0)
      if (first) prefetch<ALONE_INTO>(reinterpret_cast<const uint8_t*>(b + k) + ALONE_AHEAD, 256);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const int64_t from = k + 32 * i;
      const Words x = shorts_at(a + from, K - from), y = shorts_at(b + from, K - from);
#ifdef AXON_PAIRS
      if (!wide) {
        parts[i] = add_pairs(parts[i], x, y);
        continue;
      }
#endif
      parts[i] = fma(low_half(x), low_half(y), fma(high_half(x), high_half(y), parts[i]));
    }
  }
  return sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

// Few rows times a checkpoint's weights, row by row where they lie: slower than strips, and nothing had to be laid out
// beforehand.
template <class Weights, class Y>
void multiply_in_place(const uint16_t* x, const Weights& weights, const Y& y, int64_t R, int64_t K, bool wide) {
  const int64_t count = pieces_of(y.N, LANES), pairs = pieces_of(count, 2);
  share(pairs, least(pairs, 2 * y.N * K), [&](Pieces& pieces) {
    alignas(64) float sums[2][STORED_ROWS][LANES] = {};
    for (int64_t pair, end; pieces.take(pair, end);)
      for (; pair < end; pair++) {
        const int64_t strip = 2 * pair, together = std::min<int64_t>(2, count - strip);
        for (int64_t s = 0; s < together; s++) {
          const Stored::Part here = weights.rows(strip + s);
          for (int64_t n = 0; n < here.N; n++)
            for (int64_t r = 0; r < R; r++) sums[s][r][n] = dot(x + r * K, here.weight + n * K, K, wide, r == 0);
        }
        y.take(strip, together, 0, R, [&](int64_t s, int64_t r) { return floats_at(sums[s][r]); });
      }
  });
}

template <class X, class Y>
void multiply_weight(const X* x, const Weight& weight, const Y& y, int64_t R, int64_t K, int64_t products) {
  if (R == 0) return;
  if constexpr (sizeof(X) == 2) {
    if (weight.kind == STORED) {
      const Stored rows = stored(weight, y.N, K);
      STD_TORCH_CHECK(!Y::BY_TURNS || rows.parts[0].N * 2 == y.N, "as many rows of a gate as of what goes through it");
      const auto weights = ordered(y, rows);
      if (R <= STORED_ROWS) return multiply_in_place(x, weights, y, R, K, products == WIDE);
      return multiply_bf16(x, weights, y, R, K, products);
    }
    if (weight.kind == BF16)
      return multiply_bf16(x, ordered(y, laid<Pairs>(*weight.strips, y.N, K)), y, R, K, products);
  }
  if (weight.kind == INT8) {
    const auto strips = ordered(y, laid<Int8>(*weight.strips, y.N, K));
#ifdef AXON_TILES
    if (products == TILES && tiles_allowed()) return multiply_in_tiles<TileInt8>(x, strips, weight.scales, y, R, K);
#endif
    return multiply<Int8>(x, strips, weight.scales, y, R, K);
  }
  STD_TORCH_CHECK(weight.kind == INT4, "these weights take bfloat16 activations");
  const auto strips = laid<Int4>(*weight.strips, y.N, K);
#ifdef AXON_TILES
  if (products == TILES && tiles_allowed() && R >= WIDENED_ROWS)
    return multiply_in_tiles<TilePairs>(x, ordered(y, Widened{strips.strips, strips.length}), nullptr, y, R, K);
#endif
  multiply<Int4>(x, ordered(y, strips), nullptr, y, R, K);
}

}  // namespace
