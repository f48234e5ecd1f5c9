// Linear layers as operators, and what lays weights in strips.

#include "linear.h"

#include <torch/csrc/stable/library.h>

#include "embedding.h"

namespace {

// x […, K] and the result y […, N], of the same type: work(x, y, R, K).
template <class Work>
Tensor product(const Tensor& x, int64_t N, bool float32, const Work& work) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "activations without input channels");
  std::vector<int64_t> shape = sizes(x);
  const int64_t K = shape.back(), R = x.numel() / K;
  shape.back() = N;
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == BFLOAT16 || (float32 && type == torch::headeronly::ScalarType::Float),
                  "these weights take no activations of this type");
  const Tensor rows = in_order(x);
  Tensor y = blank(shape, x);
  const void* from = rows.const_data_ptr();
  void* to = y.mutable_data_ptr();
  if (type == BFLOAT16)
    work(static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), R, K);
  else
    work(static_cast<const float*>(from), static_cast<float*>(to), R, K);
  return y;
}

Tensor bf16(const Tensor& x, const Tensor& strips, int64_t N, int64_t products) {
  return product(x, N, false, [&](const auto* in, auto* out, int64_t R, int64_t K) {
    multiply_weight(in, weight_of(strips, nullptr, BF16, N), into(out, N), R, K, products);
  });
}

Tensor int8(const Tensor& x, const Tensor& strips, const Tensor& scale, int64_t N, int64_t products) {
  return product(x, N, true, [&](const auto* in, auto* out, int64_t R, int64_t K) {
    multiply_weight(in, weight_of(strips, &scale, INT8, N), into(out, N), R, K, products);
  });
}

Tensor int4(const Tensor& x, const Tensor& strips, int64_t N, int64_t products) {
  return product(x, N, true, [&](const auto* in, auto* out, int64_t R, int64_t K) {
    multiply_weight(in, weight_of(strips, nullptr, INT4, N), into(out, N), R, K, products);
  });
}

// A weight [N, K] as it lies in a checkpoint.
Tensor bf16_stored(const Tensor& x, const Tensor& weight, int64_t products) {
  const int64_t N = weight.size(0);
  return product(x, N, false, [&](const auto* in, auto* out, int64_t R, int64_t K) {
    multiply_weight(in, weight_of(weight, nullptr, STORED, N), into(out, N), R, K, products);
  });
}

// Rows of words [N, W] into strips [⌈N / 16⌉, at least W, 16], which are filled up with zeros.
void lay_strips(const Tensor& words, Tensor strips) {
  STD_TORCH_CHECK(words.dim() == 2 && words.element_size() == 4 && words.stride(1) == 1 && strips.dim() == 3 &&
                      strips.element_size() == 4 && strips.is_contiguous() && strips.size(2) == LANES &&
                      strips.size(0) == pieces_of(words.size(0), LANES) && strips.size(1) >= words.size(1),
                  "rows of words, and strips that hold them, are wanted");
  const int64_t N = words.size(0), W = words.size(1), length = strips.size(1), stride = words.stride(0);
  const auto* from = static_cast<const int32_t*>(words.const_data_ptr());
  auto* to = static_cast<int32_t*>(strips.mutable_data_ptr());
  share(pieces_of(N, LANES), 1, [&](Pieces& pieces) {
    for (int64_t strip, end; pieces.take(strip, end);)
      for (; strip < end; strip++)
        for (int64_t w = 0; w < length; w += 16) {
          const int32_t* first = from + strip * LANES * stride + w;
          int32_t* block = to + (strip * length + w) * LANES;
          const int64_t here = N - strip * LANES, left = W - w, count = std::min<int64_t>(16, length - w);
          if (here >= LANES && left >= 16)
            lay_turned(block, count, [&](int64_t i) { return words_at(first + i * stride); });
          else
            lay_turned(block, count, [&](int64_t i) { return words_at(first + i * stride, i < here ? left : 0); });
        }
  });
}

// The weights of some output channels, as words: how a model whose output layer is its embedding looks tokens up.
Tensor strip_rows(const Tensor& strips, const Tensor& channels, int64_t wanted) {
  std::vector<int64_t> shape = sizes(channels);
  shape.push_back(wanted);
  Tensor y = blank(shape, strips);
  gather_words(strips, channels, wanted, static_cast<int32_t*>(y.mutable_data_ptr()));
  return y;
}

}  // namespace

extern "C" bool axon_tiles() { return tiles_allowed(); }

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) {
  m.impl("bf16_stored", TORCH_BOX(&bf16_stored));
  m.impl("lay_strips", TORCH_BOX(&lay_strips));
  m.impl("strip_rows", TORCH_BOX(&strip_rows));
  m.impl("bf16_strips", TORCH_BOX(&bf16));
  m.impl("int8_strips", TORCH_BOX(&int8));
  m.impl("int4_strips", TORCH_BOX(&int4));
}
