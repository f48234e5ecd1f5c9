// All blocks of a decoder as one call, and a whole step as one. One by one a block is eleven operations, and in a step
// of one token calling them takes long: reading the weights drives everything else out of the caches, the code that
// calls included.
//
// Legend: L layers, B slots, T new tokens, H hidden, Hkv KV heads, S positions, D head_dim, K inputs and N outputs of
// the last layer

#include "blocks.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "embedding.h"

namespace {

// The blocks: x [B, T, H] at positions [B, T], cos and sin [B, 1, T, D] → [B, T, H]. Keys and values are remembered in
// k_cache and v_cache, [L, B, Hkv, S, D] each; in layer l a token sees itself and what came before it, windows[l]
// tokens in all.
Tensor blocks(const Tensor& x, const Tensor& positions, const Tensor& cos, const Tensor& sin, Tensor k_cache,
              Tensor v_cache, std::vector<int64_t> windows, int64_t heads, int64_t intermediate, double eps,
              Tensors norms, Tensors strips, Tensors scales, Tensors qkv_biases, Tensors out_biases, Tensors head_norms,
              int64_t kind, int64_t products) {
  const Weights weights{std::move(norms),
                        std::move(strips),
                        std::move(scales),
                        std::move(qkv_biases),
                        std::move(out_biases),
                        std::move(head_norms),
                        static_cast<float>(eps),
                        kind,
                        products};
  for (const Tensor& angles : {cos, sin})
    STD_TORCH_CHECK(angles.scalar_type() == BFLOAT16 && angles.numel() == x.size(0) * x.size(1) * k_cache.size(4),
                    "angles [B, 1, T, D] are wanted");
  const Tensor cosines = in_order(cos), sines = in_order(sin);
  const int64_t B = x.size(0), T = x.size(1), H = x.size(2), R = B * T, S = k_cache.size(3), Hkv = k_cache.size(2);
  const int64_t D = k_cache.size(4), L = static_cast<int64_t>(weights.layers());
  STD_TORCH_CHECK(Hkv > 0 && heads > 0 && heads % Hkv == 0, "as many query heads for each key head are wanted");
  STD_TORCH_CHECK(intermediate > 0 && intermediate % LANES == 0, "a multiple of ", LANES,
                  " channels goes through a gate");
  weights.check(heads + 2 * Hkv, D, H);
  STD_TORCH_CHECK(x.scalar_type() == BFLOAT16, "bfloat16 rows are wanted");
  STD_TORCH_CHECK(static_cast<int64_t>(windows.size()) == L, "a window for each layer is wanted");
  for (const Tensor& cache : {k_cache, v_cache})
    STD_TORCH_CHECK(cache.scalar_type() == BFLOAT16 && cache.size(0) == L && cache.size(1) == B &&
                        cache.size(2) == Hkv && cache.size(3) == S && cache.size(4) == D && cache.stride(4) == 1,
                    "a bfloat16 cache for as many layers, slots and heads, with its channels side by side, is wanted");
  STD_TORCH_CHECK(positions.scalar_type() == torch::headeronly::ScalarType::Long && positions.numel() == R,
                  "positions [B, T] are wanted");
  const Tensor rows = in_order(x), where = in_order(positions);
  const auto* at = values<int64_t>(where);
  for (int64_t i = 0; i < R; i++) STD_TORCH_CHECK(at[i] >= 0 && at[i] < S, "the cache has no position ", at[i]);

  const Shape shape{B, heads, Hkv, heads / Hkv, T, S, D};
  const Stream stream(weights, shape, H, intermediate, at, values<uint16_t>(cosines), values<uint16_t>(sines));
  Tensor y = blank({B, T, H}, x);
  auto* to = static_cast<uint16_t*>(y.mutable_data_ptr());
  Team::lead([&] {
    for (size_t layer = 0; layer < weights.layers(); layer++)
      stream.block(layer, layer == 0 ? values<uint16_t>(rows) : to, layer_of(k_cache, layer), layer_of(v_cache, layer),
                   windows[layer], to);
  });
  return y;
}

// The output layer: x […, K], normalised, times a weight [N, K] → […, N] float32.
Tensor logits(const Tensor& x, const Tensor& norm, double eps, const Tensor& strips, const std::optional<Tensor>& scale,
              int64_t N, int64_t kind, int64_t products) {
  std::vector<int64_t> shape = sizes(x);
  const int64_t K = shape.back(), R = x.numel() / K;
  shape.back() = N;
  STD_TORCH_CHECK(x.scalar_type() == BFLOAT16, "bfloat16 rows are wanted");
  const Tensor rows = in_order(x);
  const Numbers normed(R * K);
  check_numbers(norm, K);
  Tensor y = blank(shape, aoti_torch_dtype_float32());
  const Weight weight = weight_of(strips, scale.has_value() ? &*scale : nullptr, kind, N);
  Team::lead([&] {
    norm_rows(values<uint16_t>(rows), values<uint16_t>(norm), static_cast<float>(eps), normed, R, K);
    multiply_weight(normed.get(), weight, into(static_cast<float*>(y.mutable_data_ptr()), N), R, K, products);
  });
  return y;
}

// Tokens [B, T] at positions [B, T] → scores [B, T, N] float32. The table of embeddings is [N, H], bfloat16, or the
// strips of such a weight; the rest is as above.
Tensor step(const Tensor& tokens, const Tensor& positions, const Tensor& table, int64_t hidden,
            const Tensor& frequencies, double angle_scale, Tensor k_cache, Tensor v_cache, std::vector<int64_t> windows,
            int64_t heads, int64_t intermediate, double eps, Tensors norms, Tensors strips, Tensors scales,
            Tensors qkv_biases, Tensors out_biases, Tensors head_norms, int64_t kind, int64_t products,
            const Tensor& last_norm, const Tensor& last, const std::optional<Tensor>& last_scale, int64_t N,
            int64_t last_kind) {
  const std::vector<int64_t> shape{tokens.size(0), 1, tokens.size(1), 2 * frequencies.numel()};
  Tensor cos = blank(shape, aoti_torch_dtype_bfloat16()), sin = blank(shape, aoti_torch_dtype_bfloat16());
  STD_TORCH_CHECK(positions.numel() == tokens.numel(), "positions [B, T] are wanted");
  put_angles(positions, frequencies, angle_scale, static_cast<uint16_t*>(cos.mutable_data_ptr()),
             static_cast<uint16_t*>(sin.mutable_data_ptr()));
  Tensor scores;
  Team::lead([&] {
    const Tensor y = blocks(looked_up(table, tokens, hidden), positions, cos, sin, k_cache, v_cache, std::move(windows),
                            heads, intermediate, eps, std::move(norms), std::move(strips), std::move(scales),
                            std::move(qkv_biases), std::move(out_biases), std::move(head_norms), kind, products);
    scores = logits(y, last_norm, eps, last, last_scale, N, last_kind, products);
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) {
  m.impl("strips_blocks", TORCH_BOX(&blocks));
  m.impl("strips_logits", TORCH_BOX(&logits));
  m.impl("strips_step", TORCH_BOX(&step));
}
