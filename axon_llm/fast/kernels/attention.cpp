// Attention over the cache as an operator.

#include <torch/csrc/stable/library.h>

#include "attend.h"

namespace {

// q [B, Hq, T, D], k and v [B, Hkv, S, D], mask [B or 1, 1, T, S] → [B, Hq, T, D].
Tensor bf16_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, int64_t products) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && mask.dim() == 4, "heads [B, H, T, D] and a mask are wanted");
  STD_TORCH_CHECK(sizes(k) == sizes(v) && k.size(0) == q.size(0) && k.size(3) == q.size(3) && k.size(1) > 0 &&
                      q.size(1) % k.size(1) == 0,
                  "keys and values of as many slots and channels as the queries are wanted, of heads that share alike");
  const Shape z{q.size(0), q.size(1), k.size(1), q.size(1) / k.size(1), q.size(2), k.size(2), q.size(3)};
  Tensor y = blank({z.B, z.Hq, z.T, z.D}, q);
  attend(z, heads_of(q), heads_of(k), heads_of(v), Masked(mask, z),
         {static_cast<uint16_t*>(y.mutable_data_ptr()), y.stride(0), y.stride(1), y.stride(2)}, products);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) { m.impl("bf16_attention", TORCH_BOX(&bf16_attention)); }
