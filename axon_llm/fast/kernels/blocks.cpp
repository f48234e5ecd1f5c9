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

// See through_blocks; cos and sin are [B, 1, T, D].
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
  return through_blocks(weights, x, positions, values<uint16_t>(cosines), values<uint16_t>(sines), k_cache, v_cache,
                        windows, heads, intermediate);
}

Tensor logits(const Tensor& x, const Tensor& norm, double eps, const Tensor& strips, const std::optional<Tensor>& scale,
              int64_t N, int64_t kind, int64_t products) {
  return scores(x, norm, eps, strips, scale.has_value() ? &*scale : nullptr, N, kind, products);
}

// Tokens [B, T] at positions [B, T] → scores [B, T, N] float32. The table of embeddings is [N, H], bfloat16, or the
// strips of such a weight; the rest is as above.
Tensor step(const Tensor& tokens, const Tensor& positions, const Tensor& table, int64_t hidden,
            const Tensor& frequencies, double angle_scale, Tensor k_cache, Tensor v_cache, std::vector<int64_t> windows,
            int64_t heads, int64_t intermediate, double eps, Tensors norms, Tensors strips, Tensors scales,
            Tensors qkv_biases, Tensors out_biases, Tensors head_norms, int64_t kind, int64_t products,
            const Tensor& last_norm, const Tensor& last, const std::optional<Tensor>& last_scale, int64_t N,
            int64_t last_kind) {
  const Weights weights{std::move(norms),
                        std::move(strips),
                        std::move(scales),
                        std::move(qkv_biases),
                        std::move(out_biases),
                        std::move(head_norms),
                        static_cast<float>(eps),
                        kind,
                        products};
  STD_TORCH_CHECK(2 * frequencies.numel() == k_cache.size(4), "a frequency for each pair of channels is wanted");
  const Tensor x = looked_up(table, tokens, hidden), turned = angles(positions, frequencies, angle_scale);
  const auto* cos = values<uint16_t>(turned);
  const Tensor y = through_blocks(weights, x, positions, cos, cos + turned.numel() / 2, k_cache, v_cache, windows,
                                  heads, intermediate);
  return scores(y, last_norm, eps, last, last_scale.has_value() ? &*last_scale : nullptr, N, last_kind, products);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) {
  m.impl("strips_blocks", TORCH_BOX(&blocks));
  m.impl("strips_logits", TORCH_BOX(&logits));
  m.impl("strips_step", TORCH_BOX(&step));
}
