// A decoder's blocks: their four products each, and what surrounds them, norms before, rotary positions after,
// attention over the cache, the gate between, the stream that a result is added to.
//
// Legend: L layers, B slots, T new tokens, R = B * T rows, H hidden, Hq/Hkv query and KV heads, D head_dim,
// I intermediate size
//
// Read next: blocks.cpp.

#pragma once

#include <cmath>

#include "attend.h"
#include "linear.h"
#include "rope.h"

namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t ROWS_AT_ONCE = 8;  // that are worth another thread

template <class T>
const T* values(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
// Of one of many, or none where a model has none of them.
template <class T>
const T* values(const Tensors& many, size_t which) {
  return many.empty() ? nullptr : values<T>(many[which]);
}

// Room for bfloat16 numbers.
class Numbers {
 public:
  explicit Numbers(int64_t count) : owned_(memory((count + 1) / 2)) {}
  uint16_t* get() const { return reinterpret_cast<uint16_t*>(owned_.get()); }

 private:
  const Memory owned_;
};

// RMSNorm of one row, as layers/norm.py has it; `y` may be where `x` is.
inline void norm_row(const uint16_t* x, const uint16_t* weight, float eps, uint16_t* y, int64_t K) {
  Floats squares = all(0.0f);
  for (int64_t k = 0; k < K; k += 16) {
    const Floats v = load(x + k, K - k);
    squares = fma(v, v, squares);
  }
  const Floats factor = all(1.0f / std::sqrt(sum(squares) / static_cast<float>(K) + eps));
  for (int64_t k = 0; k < K; k += 16) {
    const Floats even = rounded(load(x + k, K - k) * factor);
    store(y + k, even * load(weight + k, K - k), K - k);
  }
}

// Whether a norm, or a bias, is as long as what it is for.
inline void check_numbers(const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == BFLOAT16 && x.numel() == count && x.is_contiguous(), count,
                  " bfloat16 numbers are wanted");
}

// Of rows [R, K].
inline void norm_rows(const uint16_t* x, const uint16_t* weight, float eps, const Numbers& y, int64_t R, int64_t K) {
  share_out(R, ROWS_AT_ONCE, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) norm_row(x + r * K, weight, eps, y.get() + r * K, K);
  });
}

// What all layers are made of. A list that a model has none of is empty.
struct Weights {
  static constexpr size_t NORMS = 2, PRODUCTS = 4;                // of a layer
  static constexpr size_t PARTS[PRODUCTS + 1] = {0, 3, 4, 6, 7};  // as a checkpoint has them: where each begins

  const Tensors norms;       // [H]: before attention, before the feed-forward
  const Tensors strips;      // of query, key and value; attention's output; gate and up; down; or each by itself
  const Tensors scales;      // as many: of int8, float32
  const Tensors qkv_biases;  // [(Hq + 2 Hkv) D]
  const Tensors out_biases;  // [H]
  const Tensors head_norms;  // [D]: of queries, of keys
  const float eps;
  const int64_t kind, products;

  size_t layers() const { return norms.size() / NORMS; }
  size_t tensors() const { return kind == STORED ? PARTS[PRODUCTS] : PRODUCTS; }  // of `strips`, for a layer

  // One of a layer's products, with N channels.
  Weight product(size_t layer, size_t which, int64_t N) const {
    const size_t first = kind == STORED ? PARTS[which] : which;
    const size_t parts = kind == STORED ? PARTS[which + 1] - first : 1;
    const Tensor* scale = scales.empty() ? nullptr : &scales[layer * PRODUCTS + which];
    return weight_of(&strips[layer * tensors() + first], parts, scale, kind, N);
  }

  // As many of all as there are layers, and what has no shape of its own as long as heads of D and rows of H want it.
  void check(int64_t heads, int64_t D, int64_t H) const {
    const size_t L = layers();
    const auto fits = [&](const Tensors& many, size_t each) { return many.empty() || many.size() == L * each; };
    STD_TORCH_CHECK(norms.size() == L * NORMS && strips.size() == L * tensors() && fits(scales, PRODUCTS) &&
                        fits(qkv_biases, 1) && fits(out_biases, 1) && fits(head_norms, 2),
                    "as many weights of every sort as there are layers are wanted");
    const auto long_as = [](const Tensors& many, int64_t count) {
      for (const Tensor& each : many) check_numbers(each, count);
    };
    long_as(norms, H), long_as(head_norms, D), long_as(qkv_biases, heads * D), long_as(out_biases, H);
  }
};

using Into = Results<uint16_t>;

// Tokens on their way through the layers, and the room that takes.
class Stream {
 public:
  Stream(const Weights& weights, const Shape& shape, int64_t hidden, int64_t intermediate, const int64_t* positions,
         const uint16_t* cosines, const uint16_t* sines)
      : w(weights),
        z(shape),
        H(hidden),
        I(intermediate),
        at(positions),
        cos(cosines),
        sin(sines),
        normed_(R * H),
        heads_(R * heads * z.D),
        seen_(R * z.Hq * z.D),
        between_(R * H),
        through_(R * I) {}

  // y [R, H] = a block of x, which may be in the same place.
  void block(size_t layer, const uint16_t* x, const Heads<uint16_t>& keys, const Heads<uint16_t>& values_,
             int64_t window, uint16_t* y) const {
    const int64_t D = z.D, wide = z.Hq * D;
    const auto* qkv_bias = values<uint16_t>(w.qkv_biases, layer);
    const auto* out_bias = values<uint16_t>(w.out_biases, layer);
    normalise(x, layer * w.NORMS);
    multiply(layer, 0, normed_, H, Into{.y = heads_.get(), .N = heads * D, .bias = qkv_bias});
    turn(layer);
    remember(made(z.Hq), keys), remember(made(z.Hq + z.Hkv), values_);
    const Heads<uint16_t> seen{.from = seen_.get(), .slot = z.T * wide, .head = D, .token = wide};
    attend(z, made(0), keys, values_, Causal(at, z.T, window), seen, w.products);
    multiply(layer, 1, seen_, wide, Into{.y = between_.get(), .N = H, .bias = out_bias, .residual = x});
    normalise(between_.get(), layer * w.NORMS + 1);
    multiply(layer, 2, normed_, H, Gated{.y = through_.get(), .N = 2 * I});
    multiply(layer, 3, through_, I, Into{.y = y, .N = H, .residual = between_.get()});
  }

 private:
  const Weights& w;
  const Shape z;
  const int64_t H, I, R = z.B * z.T, heads = z.Hq + 2 * z.Hkv;
  const int64_t* const at;                // [B, T]
  const uint16_t *const cos, *const sin;  // [R, D]
  const Numbers normed_, heads_, seen_, between_, through_;

  // The heads of a row from one on, as they are made: queries, keys, values.
  Heads<const uint16_t> made(int64_t head) const {
    return {heads_.get() + head * z.D, z.T * heads * z.D, z.D, heads * z.D};
  }

  void normalise(const uint16_t* x, size_t norm) const {
    norm_rows(x, values<uint16_t>(w.norms, norm), w.eps, normed_, R, H);
  }

  void multiply(size_t layer, size_t product, const Numbers& x, int64_t K, const auto& y) const {
    multiply_weight(x.get(), w.product(layer, product, y.N), y, R, K, w.products);
  }

  // Queries and keys, normalised where there are norms, and turned.
  void turn(size_t layer) const {
    const uint16_t* norms[2] = {values<uint16_t>(w.head_norms, 2 * layer),
                                values<uint16_t>(w.head_norms, 2 * layer + 1)};
    share_out(R, ROWS_AT_ONCE, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        for (int64_t h = 0; h < z.Hq + z.Hkv; h++) {
          uint16_t* head = heads_.get() + (r * heads + h) * z.D;
          const uint16_t* norm = norms[h < z.Hq ? 0 : 1];
          if (norm != nullptr) norm_row(head, norm, w.eps, head, z.D);
          turn_head(head, head, cos + r * z.D, sin + r * z.D, z.D);
        }
    });
  }

  // Keys, or values, written where they are remembered.
  void remember(const Heads<const uint16_t>& from, const Heads<uint16_t>& cache) const {
    for (int64_t b = 0; b < z.B; b++)
      for (int64_t t = 0; t < z.T; t++)
        for (int64_t h = 0; h < z.Hkv; h++)
          std::memcpy(cache.at(b, h, at[b * z.T + t]), from.at(b, h, t), z.D * sizeof(uint16_t));
  }
};

// A layer of a cache [L, B, Hkv, S, D].
inline Heads<uint16_t> layer_of(Tensor& cache, size_t layer) {
  auto* from = static_cast<uint16_t*>(cache.mutable_data_ptr()) + static_cast<int64_t>(layer) * cache.stride(0);
  return {from, cache.stride(1), cache.stride(2), cache.stride(3)};
}

}  // namespace
