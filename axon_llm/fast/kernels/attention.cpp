// Attention over the cache: two products with strips, and a softmax between them that is taken piece by piece.
//
// For 64 positions at a time, keys are laid in strips whose channels are the positions, values in strips whose channels
// are the head's. So the query rows times the keys are scores, 16 positions to a register, and the scores' weights
// times the values are added to what earlier pieces gave. Each row carries its largest score so far; when a larger one
// comes, what was summed before is scaled down (Milakov and Gimelshein, 2018; Dao et al., 2022, "FlashAttention").
//
// Pieces that no row of a task may see are skipped, so neither the future nor the unused tail of a cache is read.
//
// Legend: B slots, T new tokens, S positions, Hq/Hkv query and KV heads, G = Hq / Hkv, D head_dim; a *row* is one query
// head of one token, row t * G + g of its KV head.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

#include "tiles.h"

namespace {

constexpr int64_t PIECE = 64;  // positions
constexpr int64_t ROWS = 64;   // of a task, at most

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
    fetch<_MM_HINT_NTA>(ahead_, 128);
    ahead_ += 128;
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

// The products of attention by the vector unit: those of a task's queries `a` with keys, and of scores' weights with
// values. Few rows take keys and values as they lie in the cache; for more they are laid in strips first, in `room`.
template <class Format>
class ByVectors : public Format {
 public:
  static constexpr int64_t FEW = HELD ? 8 : 0;  // rows
  using Kind = Format;
  static int64_t places(int64_t R) { return R; }

  ByVectors(const Activations& a, int64_t, uint8_t* room) : a_(a), room_(room) {}

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

  // sums [strips, rows] += the scores' weights times a piece.
  void add(const Activations& weights, const Piece& v, Floats* sums) const {
    constexpr int64_t blocks = PIECE / Format::INPUTS;
    const int64_t rows = a_.rows;
    if (rows <= FEW && v.whole())
      for (int64_t d = 0; d < v.D; d += 32, sums += 2 * rows) {
        const auto both = [&](int64_t b) {
          const auto* ahead = reinterpret_cast<const uint8_t*>(v.next) + (d / 32 * blocks + b) * 2048;
          return PairedUp(v.from + b * Format::INPUTS * v.stride + d, v.stride, ahead);
        };
        multiply_rows_by_two<Format>(both, blocks, weights, 0, rows, sums, rows);
      }
    else {
      lay_values(v.from, v.stride, v.count, v.D, room_);
      add_strips(weights, blocks, round_up(v.D, 32) / 16, sums, v.next);
    }
  }

 private:
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
  uint8_t* const room_;
};

#ifdef AXON_TILES
// The same by the matrix unit.
class ByTiles : public TilePairs {
 public:
  using Kind = Pairs;
  static int64_t places(int64_t R) { return round_up(R, TILE); }

  ByTiles(const Activations& a, int64_t D, uint8_t* room) : a_(a), room_(room) {
    if (a.rows != TILE || D % INPUTS != 0) return;
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
    add_strips(a_, blocks, PIECE / 16, scores, k.next);
  }

  void add(const Activations& weights, const Piece& v, Floats* sums) const {
    lay_values(v.from, v.stride, v.count, v.D, room_);
    add_strips(weights, PIECE / INPUTS, round_up(v.D, 32) / 16, sums, v.next);
  }

 private:
  // Up to 16 rows with keys as they lie in the cache: a tile of 16 keys times the turned queries are the scores'
  // columns, which are turned back. For so few rows that is less work than laying keys in strips. The products and the
  // order of their sums are the same.
  void score_few(const Piece& k, int64_t blocks, Floats* scores) const {
    alignas(64) Words columns[TILE];
    const auto* ahead = reinterpret_cast<const uint8_t*>(k.next);
    for (int64_t s = 0; s < PIECE; s += TILE, scores += TILE, ahead += blocks * BYTES) {
      fetch(ahead, blocks * BYTES);
      written();
      _tile_zero(0);
      for (int64_t b = 0; b < blocks; b++) {
        _tile_loadd(4, k.from + s * k.stride + b * INPUTS, k.stride * 2);
        _tile_loadd(6, turned_.get() + b * TILE * WORDS, 64);
        multiply_tiles<1, 1>();
      }
      _tile_stored(0, columns, 64);
      turn(columns);
#pragma GCC unroll 16
      for (int64_t r = 0; r < TILE; r++) scores[r] = as_floats(columns[r]);
    }
  }

  void add_strips(const Activations& a, int64_t blocks, int64_t count, Floats* sums, const uint16_t* next) const {
    const auto* ahead = reinterpret_cast<const uint8_t*>(next);
    const uint8_t* p = room_;
    for (int64_t strip = 0; strip < count; strip += 2, p += 2 * blocks * BYTES, sums += 2 * a.rows) {
      fetch(ahead, 2 * blocks * BYTES);
      ahead += 2 * blocks * BYTES;
      const uint8_t* both[2] = {p, p + blocks * BYTES};
      tile_products<TilePairs>(a.words, a.rows * WORDS * 4, a.rows, both, 2, blocks, reinterpret_cast<int32_t*>(sums),
                               a.rows * LANES, true);
    }
  }

  const Activations& a_;
  uint8_t* const room_;
  Memory turned_{nullptr, &std::free};
};
#endif

struct Shape {
  int64_t B, Hq, Hkv, G, T, S, D;
};

// The pieces of which rows from `begin` to `end` may see something, by their first positions.
inline std::vector<int64_t> visible_pieces(const Shape& z, int64_t begin, int64_t end, const uint8_t* mask) {
  std::vector<int64_t> pieces;
  for (int64_t s = 0; s < z.S; s += PIECE) {
    uint64_t any = 0;
    for (int64_t t = begin / z.G; t <= (end - 1) / z.G && any == 0; t++) any = set_at(mask + t * z.S + s, z.S - s);
    if (any != 0) pieces.push_back(s);
  }
  return pieces;
}

// A slot's keys and values of one KV head.
struct Heads {
  const uint16_t *k, *v;
};

// Rows from `begin` to `end` of one slot and KV head; `then` is looked at next.
template <class Format>
void attend_rows(const Shape& z, const uint16_t* const* queries, int64_t begin, int64_t end, const Heads& here,
                 const Heads& then, int64_t k_stride, int64_t v_stride, const uint8_t* mask, uint16_t* const* out) {
  const int64_t R = end - begin, rows = Format::places(R), key_blocks = pieces_of(z.D, Format::INPUTS);
  const int64_t value_strips = round_up(z.D, 32) / 16;
  // one after the other, in registers' worth: strips, scores, sums
  const int64_t room_size = PIECE * key_blocks, score_size = PIECE / 16 * rows;  // room: values take as much as keys
  const Memory owned = memory(16 * (room_size + score_size + value_strips * rows));
  auto* registers = reinterpret_cast<Floats*>(owned.get());
  Floats *scores = registers + room_size, *sums = scores + score_size;
  std::fill(sums, sums + value_strips * rows, all(0.0f));

  Activations a(rows), weights(rows);
  std::vector<uint16_t> looking(R * z.D);
  for (int64_t r = 0; r < R; r++) std::memcpy(looking.data() + r * z.D, queries[begin + r], z.D * 2);
  Format::prepare(looking.data(), R, z.D, key_blocks, a);
  int32_t* words = weights.allocate(PIECE / Format::INPUTS * rows * Format::WORDS);
  const typename Format::Kind kind;
  const Format products(a, z.D, reinterpret_cast<uint8_t*>(registers));

  float most[ROWS], total[ROWS];
  std::fill(most, most + R, -std::numeric_limits<float>::infinity());
  std::fill(total, total + R, 0.0f);
  const Floats scale = all(1.0f / std::sqrt(static_cast<float>(z.D)));
  const Floats nothing = all(-std::numeric_limits<float>::infinity());

  const std::vector<int64_t> pieces = visible_pieces(z, begin, end, mask);
  for (size_t i = 0; i < pieces.size(); i++) {
    const bool more = i + 1 < pieces.size();
    const Heads& then_here = more ? here : then;
    const int64_t s = pieces[i], next = more ? pieces[i + 1] : pieces[0], count = std::min(PIECE, z.S - s);
    products.score({here.k + s * k_stride, then_here.k + next * k_stride, k_stride, count, z.D}, scores);
    for (int64_t r = 0; r < R; r++) {
      const uint64_t seen = set_at(mask + (begin + r) / z.G * z.S + s, count);
      if (seen == 0 && total[r] == 0.0f) {  // nothing yet: no largest score to compare with
        for (int64_t l = 0; l < PIECE; l += 16) put_weights(kind, words, rows, r, l, all(0.0f));
        continue;
      }
      Floats x[4], most_here = nothing;
#pragma GCC unroll 4
      for (int l = 0; l < 4; l++) {
        x[l] = choose(static_cast<uint16_t>(seen >> (16 * l)), scores[l * rows + r] * scale, nothing);
        most_here = larger(most_here, x[l]);
      }
      const float before = most[r], now = std::max(before, largest(most_here));
      const float shrink = before == now ? 1.0f : std::exp(before - now);
      Floats weight = all(0.0f);
#pragma GCC unroll 4
      for (int l = 0; l < 4; l++) {
        const Floats p = choose(static_cast<uint16_t>(seen >> (16 * l)), exponential(x[l] - all(now)), all(0.0f));
        weight = weight + p;
        put_weights(kind, words, rows, r, 16 * l, p);
      }
      most[r] = now;
      total[r] = total[r] * shrink + sum(weight);
      if (shrink != 1.0f)
        for (int64_t d = 0; d < value_strips; d++) sums[d * rows + r] = sums[d * rows + r] * all(shrink);
    }
    products.add(weights, {here.v + s * v_stride, then_here.v + next * v_stride, v_stride, count, z.D}, sums);
  }
  for (int64_t r = 0; r < R; r++)
    for (int64_t i = 0; i < value_strips; i++) {
      const Floats mean = sums[i * rows + r] * all(1.0f / total[r]);
      store(out[begin + r] + 16 * i, mean, z.D - 16 * i);
    }
}

template <class Format, class Held = int64_t>
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask) {
  const Shape z{q.size(0), q.size(1), k.size(1), q.size(1) / k.size(1), q.size(2), k.size(2), q.size(3)};
  STD_TORCH_CHECK(q.scalar_type() == BFLOAT16 && k.scalar_type() == BFLOAT16 && v.scalar_type() == BFLOAT16 &&
                      q.stride(3) == 1 && k.stride(3) == 1 && v.stride(3) == 1,
                  "bfloat16 heads with their channels side by side are wanted");
  STD_TORCH_CHECK(mask.size(1) == 1 && mask.size(2) == z.T && mask.size(3) == z.S,
                  "a mask [B or 1, 1, T, S] is wanted");
  Tensor y = blank({z.B, z.Hq, z.T, z.D}, q);
  const Tensor seen = in_order(mask);  // [B or 1, 1, T, S]
  const auto* query = static_cast<const uint16_t*>(q.const_data_ptr());
  const auto* key = static_cast<const uint16_t*>(k.const_data_ptr());
  const auto* value = static_cast<const uint16_t*>(v.const_data_ptr());
  const auto* masks = static_cast<const uint8_t*>(seen.const_data_ptr());
  auto* result = static_cast<uint16_t*>(y.mutable_data_ptr());
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
          queries[r] = query + b * q.stride(0) + head * q.stride(1) + t * q.stride(2);
          out[r] = result + ((b * z.Hq + head) * z.T + t) * z.D;
        }
        const int64_t next = std::min(task + 1, count - 1), next_b = next / (z.Hkv * tasks),
                      next_h = next / tasks % z.Hkv;
        const Heads here{key + b * k.stride(0) + h * k.stride(1), value + b * v.stride(0) + h * v.stride(1)};
        const Heads then{key + next_b * k.stride(0) + next_h * k.stride(1),
                         value + next_b * v.stride(0) + next_h * v.stride(1)};
        attend_rows<Format>(z, queries.data(), begin, end, here, then, k.stride(2), v.stride(2),
                            masks + (seen.size(0) == 1 ? 0 : b * z.T * z.S), out.data());
      }
  });
  return y;
}

Tensor bf16_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, int64_t products) {
#ifdef AXON_TILES
  if (products == TILES && tiles_allowed()) return attend<ByTiles, Tiles>(q, k, v, mask);
#endif
#ifdef AXON_PAIRS
  if (products != WIDE) return attend<ByVectors<Pairs>>(q, k, v, mask);
#endif
  return attend<ByVectors<WidePairs>>(q, k, v, mask);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) { m.impl("bf16_attention", TORCH_BOX(&bf16_attention)); }
