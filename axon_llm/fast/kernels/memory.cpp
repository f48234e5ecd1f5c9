// How fast memory can be read: the ceiling that a decode step is held against.

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "strips.h"

namespace {

// The sum of a tensor's words: one stream for each thread, and hardly anything else to do.
Tensor read_words(const Tensor& x) {
  constexpr int64_t STEP = 8 * 64;  // bytes
  const int64_t steps = in_order(x).numel() * static_cast<int64_t>(x.element_size()) / STEP;
  STD_TORCH_CHECK(steps > 0 && x.is_contiguous(), "half a kilobyte or more, in order, is wanted");
  const auto* from = static_cast<const uint8_t*>(x.const_data_ptr());
  std::atomic<int32_t> total{0};
  torch::stable::parallel_for(0, steps, 1, [&](int64_t begin, int64_t end) {
    Words sums[8];
    for (auto& part : sums) part = all(0);
    const uint8_t* p = from + begin * STEP;
    for (int64_t i = begin; i < end; i++, p += STEP) {
      if constexpr (AHEAD_ROWS == 1) prefetch<AHEAD_INTO>(p + AHEAD, STEP);
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) sums[j] = sums[j] + words_at(p + 64 * j);
    }
    for (const auto& part : sums) total += sum(part);
  });
  const int32_t found = total;
  Tensor y = blank({1}, x);
  std::memcpy(y.mutable_data_ptr(), &found, std::min<size_t>(sizeof(found), x.element_size()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) { m.impl("read_words", TORCH_BOX(&read_words)); }
