// The products of a decoder block together with what surrounds them: norms before, rotary positions after, the gate
// between, the stream that a result is added to. One by one these are ten operations a block, and in a step of one
// token calling them takes as long as a fifth of the products.
//
// Legend: B slots, T new tokens, R = B * T rows, H hidden, Hq/Hkv query and KV heads, D head_dim, I intermediate size

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

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

// The rows of x, normalised.
inline Memory normed(const Tensor& x, const Tensor& weight, double eps, int64_t R, int64_t H) {
  STD_TORCH_CHECK(x.scalar_type() == BFLOAT16 && x.is_contiguous() && weight.scalar_type() == BFLOAT16,
                  "bfloat16 rows one after the other are wanted");
  Memory rows = memory((R * H + 1) / 2);
  torch::stable::parallel_for(0, R, ROWS_AT_ONCE, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      norm_row(values<uint16_t>(x) + r * H, values<uint16_t>(weight), static_cast<float>(eps), numbers(rows) + r * H,
               H);
  });
  return rows;
}

// x [B, T, H] → queries, keys and values [B, T, Hq + 2 Hkv, D], the first two turned by cosines and sines [B, 1, T, D].
Tensor qkv(const Tensor& x, const Tensor& norm, double eps, const Tensor& strips, const Maybe& scale, const Maybe& bias,
           const Maybe& q_norm, const Maybe& k_norm, const Tensor& cos, const Tensor& sin, int64_t heads,
           int64_t kv_heads, int64_t kind, int64_t products) {
  const int64_t H = x.size(2), R = x.size(0) * x.size(1), D = cos.size(3), all = heads + 2 * kv_heads;
  STD_TORCH_CHECK(cos.scalar_type() == BFLOAT16 && cos.numel() == R * D, "cosines [B, 1, T, D] are wanted");
  Tensor y = blank({x.size(0), x.size(1), all, D}, x);
  auto* out = static_cast<uint16_t*>(y.mutable_data_ptr());
  const Memory rows = normed(x, norm, eps, R, H);
  const Weight weight{strips, values<float>(scale), static_cast<Kind>(kind)};
  const Results<uint16_t> to{.y = out, .N = all * D, .bias = values<uint16_t>(bias)};
  multiply_strips<uint16_t>(numbers(rows), weight, to, R, H, products);
  const Tensor cosines = in_order(cos), sines = in_order(sin);
  const uint16_t *q_weight = values<uint16_t>(q_norm), *k_weight = values<uint16_t>(k_norm);
  torch::stable::parallel_for(0, R, ROWS_AT_ONCE, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t h = 0; h < heads + kv_heads; h++) {
        uint16_t* head = out + (r * all + h) * D;
        const uint16_t* weight = h < heads ? q_weight : k_weight;
        if (weight != nullptr) norm_row(head, weight, static_cast<float>(eps), head, D);
        turn_head(head, head, values<uint16_t>(cosines) + r * D, values<uint16_t>(sines) + r * D, D);
      }
  });
  return y;
}

// The keys and values among heads [B, T, Hq + 2 Hkv, D], written where they are remembered, [B, Hkv, S, D] each, at
// positions [B, T].
void remember(const Tensor& heads, const Tensor& positions, Tensor k_cache, Tensor v_cache) {
  const int64_t B = heads.size(0), T = heads.size(1), all = heads.size(2), D = heads.size(3);
  const int64_t Hkv = k_cache.size(1), S = k_cache.size(2);
  STD_TORCH_CHECK(heads.is_contiguous() && heads.scalar_type() == BFLOAT16 && k_cache.scalar_type() == BFLOAT16 &&
                      v_cache.scalar_type() == BFLOAT16 && k_cache.stride(3) == 1 && v_cache.stride(3) == 1 &&
                      k_cache.size(0) == B && v_cache.size(0) == B && all >= 2 * Hkv && k_cache.size(3) == D,
                  "bfloat16 heads, and a cache for as many, are wanted");
  STD_TORCH_CHECK(positions.scalar_type() == torch::headeronly::ScalarType::Long && positions.numel() == B * T,
                  "positions [B, T] are wanted");
  const Tensor where = in_order(positions);
  const auto* at = values<int64_t>(where);
  const auto* from = values<uint16_t>(heads);
  const auto write = [&](Tensor& cache, int64_t b, int64_t position, const uint16_t* head) {
    auto* to = static_cast<uint16_t*>(cache.mutable_data_ptr()) + b * cache.stride(0) + position * cache.stride(2);
    for (int64_t h = 0; h < Hkv; h++) std::memcpy(to + h * cache.stride(1), head + h * D, D * sizeof(uint16_t));
  };
  for (int64_t row = 0; row < B * T; row++) {
    STD_TORCH_CHECK(at[row] >= 0 && at[row] < S, "the cache has no position ", at[row]);
    const uint16_t* key = from + (row * all + all - 2 * Hkv) * D;
    write(k_cache, row / T, at[row], key);
    write(v_cache, row / T, at[row], key + Hkv * D);
  }
}

// residual [B, T, N] + x [B, T, K] times the weights.
Tensor add_product(const Tensor& x, const Tensor& strips, const Maybe& scale, const Maybe& bias, const Tensor& residual,
                   int64_t kind, int64_t products) {
  const int64_t K = x.size(2), R = x.size(0) * x.size(1), N = residual.size(2);
  STD_TORCH_CHECK(x.scalar_type() == BFLOAT16 && residual.scalar_type() == BFLOAT16 && residual.is_contiguous() &&
                      residual.numel() == R * N,
                  "bfloat16 rows and a stream of as many are wanted");
  const Tensor rows = in_order(x);
  Tensor y = blank({x.size(0), x.size(1), N}, x);
  const Weight weight{strips, values<float>(scale), static_cast<Kind>(kind)};
  multiply_strips<uint16_t>(
      values<uint16_t>(rows), weight,
      {static_cast<uint16_t*>(y.mutable_data_ptr()), N, values<uint16_t>(bias), values<uint16_t>(residual)}, R, K,
      products);
  return y;
}

// x + the feed-forward of x [B, T, H], normalised.
Tensor feed_forward(const Tensor& x, const Tensor& norm, double eps, const Tensor& gate_up, const Maybe& gate_up_scale,
                    const Tensor& down, const Maybe& down_scale, int64_t I, int64_t kind, int64_t products) {
  const int64_t H = x.size(2), R = x.size(0) * x.size(1);
  Tensor y = blank({x.size(0), x.size(1), H}, x);
  const Memory rows = normed(x, norm, eps, R, H), both = memory(R * I), through = memory((R * I + 1) / 2);
  const auto k = static_cast<Kind>(kind);
  multiply_strips<uint16_t>(numbers(rows), {gate_up, values<float>(gate_up_scale), k}, {numbers(both), 2 * I}, R, H,
                            products);
  gate_rows(numbers(both), numbers(through), R, I);
  multiply_strips<uint16_t>(numbers(through), {down, values<float>(down_scale), k},
                            {static_cast<uint16_t*>(y.mutable_data_ptr()), H, nullptr, values<uint16_t>(x)}, R, I,
                            products);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) {
  m.impl("strips_qkv", TORCH_BOX(&qkv));
  m.impl("strips_remember", TORCH_BOX(&remember));
  m.impl("strips_add", TORCH_BOX(&add_product));
  m.impl("strips_feed_forward", TORCH_BOX(&feed_forward));
}
