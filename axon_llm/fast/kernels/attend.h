// Attention over the cache: two products (attention.h; for few rows, and by the matrix unit, in the files after it),
// and a softmax between them that is taken piece by piece. Each row carries its largest score so far; when a larger one
// comes, what was summed before is scaled down (Milakov and Gimelshein, 2018; Dao et al., 2022, "FlashAttention").
//
// Pieces that no row of a task may see are skipped, so neither the future nor the unused tail of a cache is read.
//
// Legend: B slots, T new tokens, S positions, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim; a *row* is one query
// head of one token, row t * G + g of its KV head.
//
// Read next: blocks.h.

#pragma once

#include <cmath>
#include <limits>

#include "attention_few.h"
#include "attention_tiles.h"

namespace {

constexpr int64_t ROWS = 64;  // of a task, at most

struct Shape {
  int64_t B, Hq, Hkv, G, T, S, D;
};

// Where the heads of some tokens are, and how far apart slots, heads and tokens.
template <class X>
struct Heads {
  X* from;
  int64_t slot, head, token;

  X* at(int64_t b, int64_t h, int64_t t) const { return from + b * slot + h * head + t * token; }
  operator Heads<const X>() const { return {from, slot, head, token}; }
};
// Of a tensor [B, H, T, D] with its channels side by side.
inline Heads<const uint16_t> heads_of(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == BFLOAT16 && x.stride(3) == 1,
                  "bfloat16 heads with their channels side by side are wanted");
  return {static_cast<const uint16_t*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// Which positions a token may see: bit i of at(b, t, s) is position s + i.
class Sight {
 public:
  virtual ~Sight() = default;
  virtual uint64_t at(int64_t b, int64_t t, int64_t s) const = 0;
};

// By a mask [B or 1, 1, T, S], …
class Masked final : public Sight {
 public:
  Masked(const Tensor& mask, const Shape& z)
      : mask_(in_order(mask)), step_(mask.size(0) == 1 ? 0 : z.T * z.S), S_(z.S) {
    STD_TORCH_CHECK(mask.element_size() == 1 && (mask.size(0) == 1 || mask.size(0) == z.B) && mask.size(1) == 1 &&
                        mask.size(2) == z.T && mask.size(3) == z.S,
                    "a mask [B or 1, 1, T, S] of bool is wanted");
  }
  uint64_t at(int64_t b, int64_t t, int64_t s) const override {
    return set_at(static_cast<const uint8_t*>(mask_.const_data_ptr()) + b * step_ + t * S_ + s, S_ - s);
  }

 private:
  const Tensor mask_;
  const int64_t step_, S_;
};

// … or by its own position [B, T]: itself and what came before it, `window` tokens in all.
class Causal final : public Sight {
 public:
  Causal(const int64_t* positions, int64_t T, int64_t window) : positions_(positions), T_(T), window_(window) {}
  uint64_t at(int64_t b, int64_t t, int64_t s) const override {
    const int64_t past = positions_[b * T_ + t] + 1 - s;
    return first(past) & ~first(past - window_);
  }

 private:
  static uint64_t first(int64_t count) {
    return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
  }
  const int64_t* const positions_;
  const int64_t T_, window_;
};

// The pieces of which rows from `begin` to `end` may see something, by their first positions.
inline std::vector<int64_t> visible_pieces(const Shape& z, int64_t b, int64_t begin, int64_t end, const Sight& sight) {
  std::vector<int64_t> pieces;
  for (int64_t s = 0; s < z.S; s += PIECE) {
    uint64_t any = 0;
    for (int64_t t = begin / z.G; t <= (end - 1) / z.G && any == 0; t++) any = sight.at(b, t, s);
    if (any != 0) pieces.push_back(s);
  }
  return pieces;
}

// A slot's keys and values of one KV head.
struct KeysAndValues {
  const uint16_t *k, *v;
};

// Rows from `begin` to `end` of one slot and KV head; `then` is looked at next.
template <class Format>
void attend_rows(const Shape& z, int64_t b, const uint16_t* const* queries, int64_t begin, int64_t end,
                 const KeysAndValues& here, const KeysAndValues& then, int64_t k_stride, int64_t v_stride,
                 const Sight& sight, uint16_t* const* out) {
  constexpr size_t SCORED = Format::SCORED;
  const int64_t R = end - begin, rows = Format::places(R), key_blocks = pieces_of(z.D, Format::INPUTS);
  // one after the other, in registers' worth: strips, scores, sums
  const int64_t room_size = PIECE * key_blocks, score_size = PIECE / 16 * rows;  // room: values take as much as keys
  const int64_t sum_size = Format::sums(rows, z.D);
  const int64_t all_size = static_cast<int64_t>(SCORED) * score_size;
  const Memory owned = memory(16 * (room_size + all_size + sum_size));
  auto* registers = reinterpret_cast<Floats*>(owned.get());
  Floats *all_scores = registers + room_size, *sums = all_scores + all_size;
  std::fill(sums, sums + sum_size, all(0.0f));

  Activations a(rows), weights(rows);
  std::vector<uint16_t> looking(R * z.D);
  for (int64_t r = 0; r < R; r++) std::memcpy(looking.data() + r * z.D, queries[begin + r], z.D * 2);
  Format::prepare(looking.data(), R, z.D, key_blocks, a);
  int32_t* words = weights.allocate(Format::words(rows));
  const Format products(a, R, z.D, reinterpret_cast<uint8_t*>(registers));

  constexpr float LOG2_E = 1.44269504f;  // weights are powers of two
  const float scale = LOG2_E / std::sqrt(static_cast<float>(z.D));
  const Floats nothing = all(-std::numeric_limits<float>::infinity());
  float most[ROWS];    // of a row's scores so far
  Floats total[ROWS];  // of its weights, in sixteen parts
  std::fill(most, most + R, -std::numeric_limits<float>::infinity());
  std::fill(total, total + R, all(0.0f));

  const std::vector<int64_t> pieces = visible_pieces(z, b, begin, end, sight);
  // A head's keys, or its values, of the i-th piece; after the last one the first of what is looked at next.
  const auto keys = [&](size_t i) {
    return i < pieces.size() ? here.k + pieces[i] * k_stride : then.k + pieces[0] * k_stride;
  };
  const auto values = [&](size_t i) {
    return i < pieces.size() ? here.v + pieces[i] * v_stride : then.v + pieces[0] * v_stride;
  };
  const auto count = [&](size_t i) { return std::min(PIECE, z.S - pieces[i]); };
  // Of pieces that are scored together: after its keys come values, and after its values keys.
  const auto last = [&](size_t i) { return SCORED > 1 && (i % SCORED == SCORED - 1 || i + 1 == pieces.size()); };
  for (size_t i = 0; i < pieces.size(); i++) {
    if (i % SCORED == 0)
      for (size_t j = i; j < std::min(i + SCORED, pieces.size()); j++)
        products.score({keys(j), last(j) ? values(i) : keys(j + 1), k_stride, count(j), z.D},
                       all_scores + static_cast<int64_t>(j - i) * score_size);
    const Floats* scores = all_scores + static_cast<int64_t>(i % SCORED) * score_size;
    const int64_t s = pieces[i];
    const Piece v{values(i), last(i) ? keys(i + 1) : values(i + 1), v_stride, count(i), z.D};
    for (int64_t r = 0; r < R; r++) {
      products.meanwhile(v, r);
      const uint64_t seen = sight.at(b, (begin + r) / z.G, s);
      if (seen == 0) {
        for (int64_t l = 0; l < PIECE; l += 16) products.put_weights(words, r, l, all(0.0f));
        continue;
      }
      const auto weigh = [&](auto whole) {  // a piece that is seen whole, as most are, needs no masks
        const auto seen_of = [&](int l, Floats x, Floats other) {
          if constexpr (whole) return x;
          return choose(static_cast<uint16_t>(seen >> (16 * l)), x, other);
        };
        Floats x[4], most_here = nothing;
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++) {
          x[l] = seen_of(l, scores[l * rows + r], nothing);
          most_here = larger(most_here, x[l]);
        }
        if (any_larger(most_here, all(most[r]))) {  // soon it seldom is
          const float now = largest(most_here), shrink = std::exp2((most[r] - now) * scale);
          most[r] = now;
          total[r] = total[r] * all(shrink);
          products.scale(sums, r, all(shrink));
        }
        const Floats at_most = all(most[r]), by = all(scale);
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++) {
          const Floats p = seen_of(l, power_of_two((x[l] - at_most) * by), all(0.0f));
          total[r] = total[r] + p;
          products.put_weights(words, r, 16 * l, p);
        }
      };
      if (seen == ~uint64_t{0})
        weigh(std::true_type());
      else
        weigh(std::false_type());
    }
    products.add(weights, v, sums);
  }
  for (int64_t r = 0; r < R; r++) products.finish(sums, r, all(1.0f / sum(total[r])), out[begin + r]);
}

// Queries q [B, Hq, T] look at keys and values k, v [B, Hkv, S] that they may see: y as q.
template <class Format, class Held = int64_t>
void attend_by(const Shape& z, const Heads<const uint16_t>& q, const Heads<const uint16_t>& k,
               const Heads<const uint16_t>& v, const Sight& sight, const Heads<uint16_t>& y) {
  const int64_t all = z.T * z.G, tasks = pieces_of(all, ROWS);
  const int64_t count = z.B * z.Hkv * tasks;
  share(count, 1, [&](Pieces& pieces) {
    std::vector<const uint16_t*> queries(all);
    std::vector<uint16_t*> out(all);
    [[maybe_unused]] const Held held(TILE);
    for (int64_t task, last; pieces.take(task, last);)
      for (; task < last; task++) {
        const int64_t b = task / (z.Hkv * tasks), h = task / tasks % z.Hkv, begin = task % tasks * ROWS;
        const int64_t end = std::min(begin + ROWS, all);
        for (int64_t r = begin; r < end; r++) {
          const int64_t t = r / z.G, head = h * z.G + r % z.G;
          queries[r] = q.at(b, head, t), out[r] = y.at(b, head, t);
        }
        const int64_t next = std::min(task + 1, count - 1), b_next = next / (z.Hkv * tasks),
                      h_next = next / tasks % z.Hkv;
        attend_rows<Format>(z, b, queries.data(), begin, end, {k.at(b, h, 0), v.at(b, h, 0)},
                            {k.at(b_next, h_next, 0), v.at(b_next, h_next, 0)}, k.token, v.token, sight, out.data());
      }
  });
}

template <class Format>
void attend_by_vectors(const Shape& z, const Heads<const uint16_t>& q, const Heads<const uint16_t>& k,
                       const Heads<const uint16_t>& v, const Sight& sight, const Heads<uint16_t>& y) {
  if (z.T * z.G <= AsTheyLie<Format>::FEW) return attend_by<AsTheyLie<Format>>(z, q, k, v, sight, y);
  attend_by<ByVectors<Format>>(z, q, k, v, sight, y);
}

inline void attend(const Shape& z, const Heads<const uint16_t>& q, const Heads<const uint16_t>& k,
                   const Heads<const uint16_t>& v, const Sight& sight, const Heads<uint16_t>& y, int64_t products) {
#ifdef AXON_TILES
  if (products == TILES && tiles_allowed()) return attend_by<ByTiles, Tiles>(z, q, k, v, sight, y);
#endif
#ifdef AXON_PAIRS
  if (products != WIDE) return attend_by_vectors<Pairs>(z, q, k, v, sight, y);
#endif
  attend_by_vectors<WidePairs>(z, q, k, v, sight, y);
}

}  // namespace
