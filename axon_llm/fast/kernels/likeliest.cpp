// The likeliest token of each row of scores. At the end of a step PyTorch takes twice as long to find it.
//
// Legend: R rows, V scores of each

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "strips.h"

namespace {

constexpr float LEAST = -std::numeric_limits<float>::infinity();

// The largest of some scores, none if one of them is no number.
inline float largest_of(const float* x, int64_t count) {
  Floats most = all(LEAST);
  Words broken = all(0);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats here = floats_at(x + i);
    most = larger(here, most);
    broken = broken | where_no_number(here, all(1), all(0));
  }
  float found = largest(most);
  bool none = largest(broken) != 0;
  for (; i < count; i++) found = std::max(found, x[i]), none |= std::isnan(x[i]);
  return none ? std::numeric_limits<float>::quiet_NaN() : found;
}

// scores [R, V] float32 → of each row the largest [R], no number if one of its scores is none, and the first token that
// has it [R] int64; -1 where it is not finite.
std::tuple<Tensor, Tensor> likeliest(const Tensor& scores) {
  constexpr int64_t PIECE = 1024;  // among as many scores the place is looked for
  STD_TORCH_CHECK(scores.scalar_type() == torch::headeronly::ScalarType::Float && scores.dim() == 2,
                  "scores [R, V] in float32 are wanted");
  const int64_t R = scores.size(0), V = scores.size(1);
  STD_TORCH_CHECK(V > 0, "there is nothing to choose from");
  const Tensor rows = scores.stride(1) == 1 ? scores : in_order(scores);
  Tensor best = blank({R}, aoti_torch_dtype_float32()), token = blank({R}, aoti_torch_dtype_int64());
  auto* values = static_cast<float*>(best.mutable_data_ptr());
  auto* places = static_cast<int64_t*>(token.mutable_data_ptr());
  share_out(R, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float* row = static_cast<const float*>(rows.const_data_ptr()) + r * rows.stride(0);
      float most = LEAST;
      int64_t from = 0;
      for (int64_t v = 0; v < V && !std::isnan(most); v += PIECE) {
        const float here = largest_of(row + v, std::min(PIECE, V - v));
        if (!(here <= most)) most = here, from = v;
      }
      values[r] = most;
      places[r] = std::isfinite(most) ? std::find(row + from, row + V, most) - row : -1;
    }
  });
  return {best, token};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) { m.impl("likeliest", TORCH_BOX(&likeliest)); }
