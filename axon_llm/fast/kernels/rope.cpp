// Rotary positions as an operator: queries and keys of a step.
//
// Legend: B slots, T new tokens, H heads, D head_dim

#include "rope.h"

#include <torch/csrc/stable/library.h>

namespace {

// x [B, T, H, D], turned by cosines and sines [B or 1, 1, T, D]; bfloat16.
Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(x.scalar_type() == BFLOAT16 && cos.scalar_type() == BFLOAT16 && x.stride(3) == 1,
                  "bfloat16 heads with their channels side by side are wanted");
  const int64_t T = x.size(1), H = x.size(2), D = x.size(3);
  const std::vector<int64_t> each{x.size(0), 1, T, D}, alike{1, 1, T, D};
  STD_TORCH_CHECK(sin.scalar_type() == BFLOAT16 && sizes(cos) == sizes(sin) && D % 2 == 0 &&
                      (sizes(cos) == each || sizes(cos) == alike),
                  "cosines and sines [B or 1, 1, T, D] are wanted");
  const int64_t step = cos.size(0) == 1 ? 0 : T * D;
  Tensor y = blank({x.size(0), T, H, D}, x);
  const auto* in = static_cast<const uint16_t*>(x.const_data_ptr());
  auto* out = static_cast<uint16_t*>(y.mutable_data_ptr());
  const Tensor cosines = in_order(cos), sines = in_order(sin);
  const auto* c = static_cast<const uint16_t*>(cosines.const_data_ptr());
  const auto* s = static_cast<const uint16_t*>(sines.const_data_ptr());
  share_out(x.size(0) * T, 16, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
      const int64_t at = token / T * step + token % T * D;
      const uint16_t *cost = c + at, *sint = s + at;
      for (int64_t h = 0; h < H; h++) {
        const uint16_t* from = in + token / T * x.stride(0) + token % T * x.stride(1) + h * x.stride(2);
        uint16_t* to = out + (token * H + h) * D;
        turn_head(from, to, cost, sint, D);
      }
    }
  });
  return y;
}

// Cosines and sines [2, B, 1, T, D], bfloat16: see put_angles.
Tensor angles(const Tensor& positions, const Tensor& frequencies, double scale) {
  const int64_t D = 2 * frequencies.numel();
  Tensor y = blank({2, positions.size(0), 1, positions.size(1), D}, aoti_torch_dtype_bfloat16());
  auto* cos = static_cast<uint16_t*>(y.mutable_data_ptr());
  put_angles(positions, frequencies, scale, cos, cos + positions.numel() * D);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) {
  m.impl("bf16_angles", TORCH_BOX(&angles));
  m.impl("bf16_rotate", TORCH_BOX(&rotate));
}
