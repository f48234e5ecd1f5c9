// Linear layers: rows of activations times all strips of a weight. strips.py has the layouts in PyTorch.

#include <torch/csrc/stable/library.h>

#include "formats.h"

namespace {

// How many of `count` parts of a weight a thread takes at a time: an eighth of its share, or all of it if the weight is
// small: taking pieces costs a small product more than waiting for the other threads.
inline int64_t piece(int64_t count, int64_t bytes) {
  constexpr int64_t SMALL = 4 << 20;
  const int64_t threads = torch::stable::get_num_threads(), shares = bytes < SMALL ? threads : 8 * threads;
  return (count + shares - 1) / shares;
}

// y [R, N] = x [R, K] times the weights of all strips; threads share the strips.
template <class Format, class X>
void multiply(const X* x, const uint8_t* strips, const float* scales, X* y, int64_t R, int64_t K, int64_t N) {
  const int64_t blocks = (K + Format::INPUTS - 1) / Format::INPUTS;
  Activations a;
  Format::prepare(x, R, K, blocks, a);
  const int64_t count = (N + LANES - 1) / LANES;
  share(count, piece(count, count * blocks * Format::BYTES), [&](int64_t begin, int64_t end) {
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
  std::vector<int64_t> shape = sizes(x);
  const int64_t K = shape.back(), R = x.numel() / K;
  shape.back() = N;
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == BFLOAT16 || (FLOAT32 && type == torch::headeronly::ScalarType::Float),
                  "these weights take no activations of this type");
  STD_TORCH_CHECK(
      strips.numel() * 4 == (N + LANES - 1) / LANES * ((K + Format::INPUTS - 1) / Format::INPUTS) * Format::BYTES,
      "strips of ", strips.numel(), " words are no weights for ", K, " inputs and ", N, " outputs");
  const Tensor rows = in_order(x);
  Tensor y = blank(shape, x);
  const auto* weights = static_cast<const uint8_t*>(strips.const_data_ptr());
  const void* from = rows.const_data_ptr();
  void* to = y.mutable_data_ptr();
  if (type == BFLOAT16)
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

// The sum of the products of two rows of bfloat16, in four parts: none waits for another.
inline float dot(const uint16_t* a, const uint16_t* b, int64_t K, bool wide) {
  __m512 parts[4];
  for (auto& part : parts) part = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 128) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const int64_t left = K - k - 32 * i;
      const __mmask32 here = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
      const __m512i x = _mm512_maskz_loadu_epi16(here, a + k + 32 * i),
                    y = _mm512_maskz_loadu_epi16(here, b + k + 32 * i);
#ifdef __AVX512BF16__
      if (!wide) {
        parts[i] = _mm512_dpbf16_ps(parts[i], (__m512bh)x, (__m512bh)y);
        continue;
      }
#endif
      const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
      const auto low = [](__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); };
      const auto high = [&](__m512i pair) { return _mm512_castsi512_ps(_mm512_and_si512(pair, upper)); };
      parts[i] = _mm512_fmadd_ps(low(x), low(y), _mm512_fmadd_ps(high(x), high(y), parts[i]));
    }
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(parts[0], parts[1]), _mm512_add_ps(parts[2], parts[3])));
}

// A few rows times a weight [N, K] as it lies in a checkpoint. Slower than strips, and nothing had to be laid out.
Tensor stored(const Tensor& x, const Tensor& weight, bool wide) {
  std::vector<int64_t> shape = sizes(x);
  const int64_t K = shape.back(), R = x.numel() / K, N = weight.size(0);
  shape.back() = N;
  STD_TORCH_CHECK(x.scalar_type() == BFLOAT16 && weight.scalar_type() == BFLOAT16 && weight.size(1) == K,
                  "bfloat16 rows as long as those of the weight are wanted");
  const Tensor rows = in_order(x);
  Tensor y = blank(shape, x);
  const auto* in = static_cast<const uint16_t*>(rows.const_data_ptr());
  const auto* w = static_cast<const uint16_t*>(weight.const_data_ptr());
  auto* out = static_cast<uint16_t*>(y.mutable_data_ptr());
  share(N, piece(N, 2 * N * K), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      for (int64_t r = 0; r < R; r++) store(out + r * N + n, _mm512_set1_ps(dot(in + r * K, w + n * K, K, wide)), 1);
  });
  return y;
}

// Rows of words [N, W] into strips [⌈N / 16⌉, at least W, 16], which are filled up with zeros.
void lay_strips(const Tensor& words, Tensor strips) {
  const int64_t N = words.size(0), W = words.size(1), length = strips.size(1);
  const auto* from = static_cast<const int32_t*>(words.const_data_ptr());
  auto* to = static_cast<int32_t*>(strips.mutable_data_ptr());
  share((N + LANES - 1) / LANES, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; strip++)
      for (int64_t w = 0; w < length; w += 16) {
        const int64_t left = W - w;
        const __mmask16 here = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
        __m512i rows[16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; i++) {
          const int64_t n = strip * LANES + i;
          rows[i] = _mm512_maskz_loadu_epi32(n < N ? here : 0, from + n * words.stride(0) + w);
        }
        turn(rows);
        for (int64_t i = 0; i < std::min<int64_t>(16, length - w); i++)
          _mm512_storeu_si512(to + (strip * length + w + i) * LANES, rows[i]);
      }
  });
}

// The weights of some output channels, as words: how a model whose output layer is its embedding looks tokens up.
Tensor strip_rows(const Tensor& strips, const Tensor& channels, int64_t wanted) {
  std::vector<int64_t> shape = sizes(channels);
  shape.push_back(wanted);
  const int64_t words = strips.size(1);
  STD_TORCH_CHECK(channels.scalar_type() == torch::headeronly::ScalarType::Long, "token ids are int64");
  const Tensor numbers = in_order(channels);
  Tensor y = blank(shape, strips);
  const auto* from = static_cast<const int32_t*>(strips.const_data_ptr());
  const auto* channel = static_cast<const int64_t*>(numbers.const_data_ptr());
  auto* to = static_cast<int32_t*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, channels.numel(), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      STD_TORCH_CHECK(channel[i] >= 0 && channel[i] < strips.size(0) * LANES, "there is no row ", channel[i]);
      const int32_t* lane = from + channel[i] / LANES * words * LANES + channel[i] % LANES;
      for (int64_t w = 0; w < wanted; w++) to[i * wanted + w] = lane[w * LANES];
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) {
  m.impl("bf16_stored", TORCH_BOX(&stored));
  m.impl("lay_strips", TORCH_BOX(&lay_strips));
  m.impl("strip_rows", TORCH_BOX(&strip_rows));
  m.impl("bf16_strips", TORCH_BOX(&bf16));
  m.impl("int8_strips", TORCH_BOX(&int8));
  m.impl("int4_strips", TORCH_BOX(&int4));
}
