// Linear layers: rows of activations times all strips of a weight. strips.py has the layouts in PyTorch.

#include <torch/csrc/stable/library.h>

#include "strips.h"

namespace {

constexpr int64_t PIECES = 16;  // that threads share a weight in

// y [R, N] = x [R, K] times the weights of all strips; threads share the strips.
template <class Format, class X>
void multiply(const X* x, const uint8_t* strips, const float* scales, X* y, int64_t R, int64_t K, int64_t N) {
  const int64_t blocks = (K + Format::INPUTS - 1) / Format::INPUTS;
  Activations a;
  Format::prepare(x, R, K, blocks, a);
  const int64_t count = (N + LANES - 1) / LANES;
  share(count, std::max<int64_t>(1, count / PIECES), [&](int64_t begin, int64_t end) {
    alignas(64) typename Format::Sum sums[TOGETHER];
    for (int64_t strip = begin; strip < end; strip++)
      for (int64_t from = 0; from < R; from += TOGETHER) {
        const int64_t rows = std::min(TOGETHER, R - from);
        for (int64_t r = 0; r < rows; r++) sums[r] = Format::first(a, from + r);
        const uint8_t* p = strips + strip * blocks * Format::BYTES;
        for (int64_t b = 0; b < blocks; b++, p += Format::BYTES) {
          const typename Format::Block block(p);
          if (rows >= AHEAD_ROWS)
            for (int64_t i = 0; i < Format::BYTES; i += 64)
              _mm_prefetch(reinterpret_cast<const char*>(p) + AHEAD + i, _MM_HINT_T1);
          const int64_t at = b * R + from;
          int64_t r = 0;
          for (; r + 4 <= rows; r += 4) Format::template multiply<4>(block, a, at + r, sums + r);
          for (; r < rows; r++) Format::template multiply<1>(block, a, at + r, sums + r);
        }
        const int64_t n = strip * LANES;
        const __mmask16 here = N - n >= LANES ? 0xffff : (1u << (N - n)) - 1;
        for (int64_t r = 0; r < rows; r++) {
          const float* scale = scales == nullptr ? nullptr : scales + n;
          store(y + (from + r) * N + n, Format::finish(sums[r], a, from + r, scale), here);
        }
      }
  });
}

template <class Format, bool FLOAT32 = true>
Tensor product(const Tensor& x, const Tensor& strips, const float* scales, int64_t N) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); d++) shape.push_back(x.size(d));
  const int64_t K = shape.back(), R = x.numel() / K;
  shape.back() = N;
  const Tensor rows = in_order(x);
  Tensor y = blank(shape, x);
  const auto* weights = static_cast<const uint8_t*>(strips.const_data_ptr());
  const void* from = rows.const_data_ptr();
  void* to = y.mutable_data_ptr();
  if (x.scalar_type() == torch::headeronly::ScalarType::BFloat16)
    multiply<Format>(static_cast<const uint16_t*>(from), weights, scales, static_cast<uint16_t*>(to), R, K, N);
  else if constexpr (FLOAT32)
    multiply<Format>(static_cast<const float*>(from), weights, scales, static_cast<float*>(to), R, K, N);
  return y;
}

Tensor bf16(const Tensor& x, const Tensor& strips, int64_t out_features, bool wide) {
#ifdef __AVX512BF16__
  if (!wide) return product<Pairs, false>(x, strips, nullptr, out_features);
#endif
  return product<WidePairs, false>(x, strips, nullptr, out_features);
}

Tensor int8(const Tensor& x, const Tensor& strips, const Tensor& scale, int64_t out_features) {
  return product<Int8>(x, strips, static_cast<const float*>(scale.const_data_ptr()), out_features);
}

Tensor int4(const Tensor& x, const Tensor& strips, int64_t out_features) {
  return product<Int4>(x, strips, nullptr, out_features);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) {
  m.impl("bf16_strips", TORCH_BOX(&bf16));
  m.impl("int8_strips", TORCH_BOX(&int8));
  m.impl("int4_strips", TORCH_BOX(&int4));
}
