// Weights in strips, and rows of activations multiplied by them: what linear.h and attention.h share.
//
// A decode step is bound by reading its weights, and memory is read fastest as one stream from front to back. So the
// weights of 16 output channels lie together, as a *strip*: 64 bytes hold the next four bytes of each of the 16, the
// next 64 bytes the four after those. What four bytes are depends on the format:
//
//   bf16   2 input channels
//   int8   4 input channels, as bytes around 128
//   int4   8 input channels, as half bytes around 8, those of the first four low; after each group of 32 input
//          channels comes the group's scale and middle, both bfloat16
//
// 64 bytes are a register, or two (lanes.h). A *block* is 16 times 64 bytes of weights: every row is multiplied by
// it, once it is loaded or as it is, and the next block of the strip follows. Four rows are multiplied in turn, product
// by product, because a product takes longer than the processor waits before it starts the next one that does not
// depend on it. Many rows, bound by reading activations, are multiplied by blocks of two strips at once.
//
// The integer formats round activations to bytes: int8 with a scale for each row, int4 with a scale for each row and
// group. Each row's sum is taken in the same order whatever rows are computed with it: its result is the same to the
// bit.
//
// Legend: R rows, K input channels, N output channels
//
// Read next: formats.h.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "threads.h"

using torch::stable::Tensor;

namespace {

// How products are computed, as ops.py numbers it: by the vector unit, in float32 by the vector unit (bfloat16 weights
// only), or by the matrix unit.
enum Products : int64_t { PAIRS, WIDE, TILES };

constexpr auto BFLOAT16 = torch::headeronly::ScalarType::BFloat16;
constexpr int64_t TOGETHER = 64;  // rows that go through a strip together: their sums stay in the nearest cache
constexpr int64_t GROUP = 32;     // input channels that share a scale in int4
// How many bytes ahead of a block to prefetch, and into which cache: with AHEAD_ROWS rows and more (INT4_AHEAD_ROWS of
// int4), and with one. Measured: on Zen 4 one row is slower with it, four of bfloat16 and int8 are,
// and 16 rows are 1.4 times as fast with it, but slower than without into the first level; on Zen 5 what comes next
// goes past the second level, and one row is slower with it; on Intel one row of int4 is 1.3 times as fast, and half as
// fast where it goes past the second level. With AVX2 one row of int4 is 1.1 times as fast on Zen 3, but only near:
// 1,600 bytes ahead one of int8 or bfloat16 is slower than without; Zen 4 with AVX2 reads one of bfloat16 at 0.75 and
// one of int8 at 0.9 of what it does without. Others with AVX2 do as Zen 3, and have not been timed. The
// instruction for intersections tells a Zen 5 from a Zen 4, whatever the compiler knows: it is not used.
#if defined(AXON_TILES) || (defined(AXON_INTEL) && !defined(__AVX512VP2INTERSECT__))
constexpr int64_t AHEAD = 3072, AHEAD_ROWS = 1, INT4_AHEAD_ROWS = 1, ALONE_AHEAD = 3072;
constexpr auto AHEAD_INTO = _MM_HINT_T1, ALONE_INTO = _MM_HINT_T1;
#elif defined(__AVX512VP2INTERSECT__)
constexpr int64_t AHEAD = 10240, AHEAD_ROWS = 2, INT4_AHEAD_ROWS = 2, ALONE_AHEAD = 0;
constexpr auto AHEAD_INTO = _MM_HINT_NTA, ALONE_INTO = _MM_HINT_T0;
#elif defined(__AVX512F__)
constexpr int64_t AHEAD = 12288, AHEAD_ROWS = 5, INT4_AHEAD_ROWS = 4, ALONE_AHEAD = 0;
constexpr auto AHEAD_INTO = _MM_HINT_T1, ALONE_INTO = _MM_HINT_T1;
#else
#ifdef AXON_ZEN4
constexpr int64_t ALONE_AHEAD = 0;
#else
constexpr int64_t ALONE_AHEAD = 640;
#endif
constexpr int64_t AHEAD = 12288, AHEAD_ROWS = 4, INT4_AHEAD_ROWS = 4;
constexpr auto AHEAD_INTO = _MM_HINT_T1, ALONE_INTO = _MM_HINT_T0;
#endif
// One row takes two strips at once: of int4 that is 1.04 times as fast on Intel, on Zen 4 slower.
constexpr bool ALONE_BY_TWO = AHEAD_ROWS == 1;

// Words of memory whose beginning a register can be read from at once.
using Memory = std::unique_ptr<int32_t[], decltype(&std::free)>;
inline Memory memory(int64_t words) {
  void* made = std::aligned_alloc(64, (words * 4 + 63) / 64 * 64);
  if (made == nullptr) throw std::bad_alloc();
  return {static_cast<int32_t*>(made), &std::free};
}

// Rows of activations as the blocks want them: the words of all rows for the first block, then for the second.
struct Activations {
  int64_t rows;  // R, or more: places for rows in a block
  Memory owned{nullptr, &std::free};
  const int32_t* words = nullptr;  // [blocks, rows, words of a block]
  std::vector<float> scale;        // int8: [R]; int4: [blocks, rows, 2]
  std::vector<float> sum;          // int4: [blocks, rows, 2], of a group's rounded activations
  std::vector<int32_t> start;      // what the integer sums begin with, as long as scale

  explicit Activations(int64_t places) : rows(places) {}

  int32_t* allocate(int64_t count) {
    owned = memory(count);
    words = owned.get();
    return owned.get();
  }
};

// The processor fetches some bytes into a cache in the meantime, the second-level one unless said.
template <auto INTO = _MM_HINT_T1>
[[gnu::always_inline]] inline void prefetch(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(from) + i, INTO);
}
// … into the second-level one, and where it stands between loads: compilers put `prefetch` where they like.
[[gnu::always_inline]] inline void prefetch_now(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) asm volatile("prefetcht1 %0" ::"m"(from[i]));
}

inline std::vector<int64_t> sizes(const Tensor& x) {
  std::vector<int64_t> all;
  for (int64_t d = 0; d < x.dim(); d++) all.push_back(x.size(d));
  return all;
}

// A tensor without values, of a type. PyTorch's own `new_empty` is looked up by name at every call, which takes longer
// than a small product.
inline Tensor blank(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}
// … like another's.
inline Tensor blank(const std::vector<int64_t>& sizes, const Tensor& like) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return blank(sizes, dtype);
}

inline Tensor in_order(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// -factor * sum; of activations that are no numbers the sum is nonsense, and the product must not be undefined.
inline int32_t less(uint32_t factor, int32_t sum) { return static_cast<int32_t>(-factor * static_cast<uint32_t>(sum)); }

}  // namespace
