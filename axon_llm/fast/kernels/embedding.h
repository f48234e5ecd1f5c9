// Embeddings of tokens, from a table or from the strips of an output layer that is the same matrix.
//
// Read next: blocks.cpp.

#pragma once

#include "strips.h"

namespace {

// The weights of some output channels, `wanted` words of each, from strips [count, words, LANES].
inline void gather_words(const Tensor& strips, const Tensor& channels, int64_t wanted, int32_t* to) {
  STD_TORCH_CHECK(strips.dim() == 3 && strips.element_size() == 4 && strips.is_contiguous() &&
                      strips.size(2) == LANES && wanted <= strips.size(1),
                  "strips of ", wanted, " words are wanted");
  const int64_t words = strips.size(1);
  STD_TORCH_CHECK(channels.scalar_type() == torch::headeronly::ScalarType::Long, "token ids are int64");
  const Tensor numbers = in_order(channels);
  const auto* from = static_cast<const int32_t*>(strips.const_data_ptr());
  const auto* channel = static_cast<const int64_t*>(numbers.const_data_ptr());
  share_out(channels.numel(), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      STD_TORCH_CHECK(channel[i] >= 0 && channel[i] < strips.size(0) * LANES, "there is no row ", channel[i]);
      const int32_t* lane = from + channel[i] / LANES * words * LANES + channel[i] % LANES;
      for (int64_t w = 0; w < wanted; w++) to[i * wanted + w] = lane[w * LANES];
    }
  });
}

// The embeddings of tokens [B, T], [B, T, H]: rows of a table [N, H], bfloat16, or of its strips.
inline Tensor looked_up(const Tensor& table, const Tensor& tokens, int64_t H) {
  Tensor y = blank({tokens.size(0), tokens.size(1), H}, aoti_torch_dtype_bfloat16());
  if (table.scalar_type() != BFLOAT16) {
    STD_TORCH_CHECK(table.dim() == 3 && H % 2 == 0 && H / 2 <= table.size(1), "strips of ", H, " channels are wanted");
    gather_words(table, tokens, H / 2, static_cast<int32_t*>(y.mutable_data_ptr()));
    return y;
  }
  STD_TORCH_CHECK(tokens.scalar_type() == torch::headeronly::ScalarType::Long, "token ids are int64");
  STD_TORCH_CHECK(table.is_contiguous() && table.dim() == 2 && table.size(1) == H, "a table of ", H,
                  " channels is wanted");
  const Tensor numbers = in_order(tokens);
  const auto* from = static_cast<const uint16_t*>(table.const_data_ptr());
  const auto* token = static_cast<const int64_t*>(numbers.const_data_ptr());
  auto* to = static_cast<uint16_t*>(y.mutable_data_ptr());
  for (int64_t i = 0; i < tokens.numel(); i++) {
    STD_TORCH_CHECK(token[i] >= 0 && token[i] < table.size(0), "there is no token ", token[i]);
    std::memcpy(to + i * H, from + token[i] * H, H * sizeof(uint16_t));
  }
  return y;
}

}  // namespace
