// A decoder block as one call: its four products, and what surrounds them, norms before, rotary positions after,
// attention over the cache, the gate between, the stream that a result is added to. One by one these are eleven
// operations a block, and in a step of one token calling them takes as long as a fifth of the products.
//
// Legend: B slots, T new tokens, R = B * T rows, H hidden, Hq/Hkv query and KV heads, D head_dim, I intermediate size

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

#include "attend.h"
#include "linear.h"
#include "rope.h"

namespace {

using Maybe = std::optional<Tensor>;

constexpr int64_t ROWS_AT_ONCE = 8;  // that are worth another thread

template <class T>
const T* values(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
const T* values(const Maybe& x) {
  return x.has_value() ? values<T>(*x) : nullptr;
}

inline uint16_t* numbers(const Memory& room) { return reinterpret_cast<uint16_t*>(room.get()); }

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

// Rows of a gate and what goes through it, [R, 2 I] → [R, I]: silu(gate) * up.
inline void gate_rows(const uint16_t* both, uint16_t* y, int64_t R, int64_t I) {
  torch::stable::parallel_for(0, R, ROWS_AT_ONCE, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t i = 0; i < I; i += 16) {
        const Floats gate = load(both + 2 * r * I + i, I - i), up = load(both + (2 * r + 1) * I + i, I - i);
        const Floats silu = gate / (all(1.0f) + exponential(all(0.0f) - gate));
        store(y + r * I + i, rounded(silu) * up, I - i);
      }
  });
}

// The rows of x [R, H], normalised.
inline Memory normed(const uint16_t* x, const Tensor& weight, double eps, int64_t R, int64_t H) {
  STD_TORCH_CHECK(weight.scalar_type() == BFLOAT16 && weight.numel() == H, "a bfloat16 norm is wanted");
  Memory rows = memory((R * H + 1) / 2);
  torch::stable::parallel_for(0, R, ROWS_AT_ONCE, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      norm_row(x + r * H, values<uint16_t>(weight), static_cast<float>(eps), numbers(rows) + r * H, H);
  });
  return rows;
}

// A weight in strips as a block's arguments bring it.
struct Layer {
  const Tensor& strips;
  const Maybe &scale, &bias;

  Weight weight(int64_t kind) const { return {strips, values<float>(scale), static_cast<Kind>(kind)}; }
};

// x [B, T, H] → queries, keys and values [B, T, Hq + 2 Hkv, D], the first two normalised, where there are norms, and
// turned by cosines and sines [B, 1, T, D].
Memory qkv(const Tensor& x, const Tensor& norm, double eps, const Layer& layer, const Maybe& q_norm,
           const Maybe& k_norm, const Tensor& cos, const Tensor& sin, const Shape& z, int64_t kind, int64_t products) {
  const int64_t H = x.size(2), R = z.B * z.T, D = z.D, all = z.Hq + 2 * z.Hkv;
  STD_TORCH_CHECK(cos.scalar_type() == BFLOAT16 && cos.numel() == R * D && sin.numel() == R * D,
                  "cosines and sines [B, 1, T, D] are wanted");
  Memory heads = memory((R * all * D + 1) / 2);
  uint16_t* out = numbers(heads);
  const Memory rows = normed(values<uint16_t>(x), norm, eps, R, H);
  const Results<uint16_t> to{.y = out, .N = all * D, .bias = values<uint16_t>(layer.bias)};
  multiply_strips<uint16_t>(numbers(rows), layer.weight(kind), to, R, H, products);
  const Tensor cosines = in_order(cos), sines = in_order(sin);
  const uint16_t *q_weight = values<uint16_t>(q_norm), *k_weight = values<uint16_t>(k_norm);
  torch::stable::parallel_for(0, R, ROWS_AT_ONCE, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t h = 0; h < z.Hq + z.Hkv; h++) {
        uint16_t* head = out + (r * all + h) * D;
        const uint16_t* weight = h < z.Hq ? q_weight : k_weight;
        if (weight != nullptr) norm_row(head, weight, static_cast<float>(eps), head, D);
        turn_head(head, head, values<uint16_t>(cosines) + r * D, values<uint16_t>(sines) + r * D, D);
      }
  });
  return heads;
}

// Keys, or values, [B, Hkv, T, D], written where they are remembered, [B, Hkv, S, D], at positions [B, T].
void remember(const Shape& z, const Heads<const uint16_t>& made, const int64_t* positions, Tensor& cache) {
  auto* to = static_cast<uint16_t*>(cache.mutable_data_ptr());
  for (int64_t b = 0; b < z.B; b++)
    for (int64_t t = 0; t < z.T; t++) {
      uint16_t* here = to + b * cache.stride(0) + positions[b * z.T + t] * cache.stride(2);
      for (int64_t h = 0; h < z.Hkv; h++)
        std::memcpy(here + h * cache.stride(1), made.at(b, h, t), z.D * sizeof(uint16_t));
    }
}

// y [R, H] = x + the feed-forward of x, normalised.
void feed_forward(const uint16_t* x, const Tensor& norm, double eps, const Layer& gate_up, const Layer& down, int64_t I,
                  int64_t R, int64_t H, uint16_t* y, int64_t kind, int64_t products) {
  const Memory rows = normed(x, norm, eps, R, H), both = memory(R * I), through = memory((R * I + 1) / 2);
  multiply_strips<uint16_t>(numbers(rows), gate_up.weight(kind), {numbers(both), 2 * I}, R, H, products);
  gate_rows(numbers(both), numbers(through), R, I);
  multiply_strips<uint16_t>(numbers(through), down.weight(kind), {y, H, nullptr, x}, R, I, products);
}

// A block: x [B, T, H] at positions [B, T] → [B, T, H]. Keys and values are remembered in k_cache and v_cache,
// [B, Hkv, S, D] each; a token sees itself and what came before it, `window` tokens in all.
Tensor block(const Tensor& x, const Tensor& positions, const Tensor& cos, const Tensor& sin, Tensor k_cache,
             Tensor v_cache, int64_t window, int64_t heads, const Tensor& norm, double eps, const Tensor& qkv_strips,
             const Maybe& qkv_scale, const Maybe& qkv_bias, const Maybe& q_norm, const Maybe& k_norm,
             const Tensor& out_strips, const Maybe& out_scale, const Maybe& out_bias, const Tensor& second_norm,
             double second_eps, const Tensor& gate_up, const Maybe& gate_up_scale, const Tensor& down,
             const Maybe& down_scale, int64_t I, int64_t kind, int64_t products) {
  const Shape z{x.size(0), heads, k_cache.size(1), heads / k_cache.size(1), x.size(1), k_cache.size(2), cos.size(3)};
  const int64_t H = x.size(2), R = z.B * z.T, D = z.D, all = z.Hq + 2 * z.Hkv;
  STD_TORCH_CHECK(x.scalar_type() == BFLOAT16 && x.is_contiguous(), "bfloat16 rows one after the other are wanted");
  STD_TORCH_CHECK(positions.scalar_type() == torch::headeronly::ScalarType::Long && positions.numel() == R,
                  "positions [B, T] are wanted");
  for (const Tensor& cache : {k_cache, v_cache})
    STD_TORCH_CHECK(cache.size(0) == z.B && cache.size(1) == z.Hkv && cache.size(2) == z.S && cache.size(3) == D,
                    "a cache for as many slots and heads is wanted");
  const auto keys = heads_of(k_cache), remembered = heads_of(v_cache);
  const Tensor where = in_order(positions);
  const auto* at = values<int64_t>(where);
  for (int64_t i = 0; i < R; i++) STD_TORCH_CHECK(at[i] >= 0 && at[i] < z.S, "the cache has no position ", at[i]);

  const Memory made = qkv(x, norm, eps, {qkv_strips, qkv_scale, qkv_bias}, q_norm, k_norm, cos, sin, z, kind, products);
  const Heads<const uint16_t> q{numbers(made), z.T * all * D, D, all * D};
  remember(z, {q.at(0, heads, 0), q.slot, q.head, q.token}, at, k_cache);
  remember(z, {q.at(0, heads + z.Hkv, 0), q.slot, q.head, q.token}, at, v_cache);
  const Memory seen = memory((R * heads * D + 1) / 2), stream = memory((R * H + 1) / 2);
  attend(z, q, keys, remembered, Causal(at, z.T, window), {numbers(seen), z.T * heads * D, D, heads * D}, products);
  const Layer out{out_strips, out_scale, out_bias};
  multiply_strips<uint16_t>(numbers(seen), out.weight(kind),
                            {numbers(stream), H, values<uint16_t>(out_bias), values<uint16_t>(x)}, R, heads * D,
                            products);
  Tensor y = blank({x.size(0), x.size(1), H}, x);
  const Maybe none;
  feed_forward(numbers(stream), second_norm, second_eps, {gate_up, gate_up_scale, none}, {down, down_scale, none}, I, R,
               H, static_cast<uint16_t*>(y.mutable_data_ptr()), kind, products);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) { m.impl("strips_block", TORCH_BOX(&block)); }
