// Weights in strips, and rows of activations multiplied by them: what linear.cpp and attention.cpp share.
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
// 64 bytes are a register. A *block* is 16 registers of weights: it is loaded, every row is multiplied by it, and the
// next block of the strip follows. Four rows are multiplied in turn, product by product, because a product takes longer
// than the processor waits before it starts the next one that does not depend on it.
//
// The integer formats round activations to bytes: int8 with a scale for each row, int4 with a scale for each row and
// group. Each row's sum is taken in the same order whatever rows are computed with it: its result is the same to the
// bit.
//
// The instructions (AVX-512 with VNNI, and BF16 where there is one) are described in Intel's Intrinsics Guide.
//
// Legend: R rows, K input channels, N output channels
//
// Read next: formats.h.

#pragma once

#include <immintrin.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

using torch::stable::Tensor;

namespace {

// How products are computed, as ops.py numbers it: by the vector unit, in float32 by the vector unit (bfloat16 weights
// only), or by the matrix unit.
enum Products : int64_t { PAIRS, WIDE, TILES };

constexpr auto BFLOAT16 = torch::headeronly::ScalarType::BFloat16;
constexpr int64_t LANES = 16;     // output channels of a strip
constexpr int64_t TOGETHER = 64;  // rows that go through a strip together: their sums stay in the nearest cache
constexpr int64_t GROUP = 32;     // input channels that share a scale in int4
// Bytes ahead of a block that the processor is told to fetch, from AHEAD_ROWS rows on. Measured: on Zen 4 one row is
// slower with it, 16 rows are 1.4 times as fast; on Intel with AMX one row of int4 is 1.3 times as fast.
#ifdef AXON_TILES
constexpr int64_t AHEAD = 3072, AHEAD_ROWS = 1;
#else
constexpr int64_t AHEAD = 12288, AHEAD_ROWS = 4;
#endif

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

// Parts 0 … count, which threads take in pieces as they get done: on a shared machine one may be held up, and with
// fixed halves everybody would wait for it. A piece is three quarters of a fair share of the rest, so first ones
// are large and last ones small; but not less than `least`, for it takes a while until memory delivers a new piece.
class Pieces {
 public:
  Pieces(int64_t count, int64_t least)
      : count_(count), least_(std::max<int64_t>(least, 1)), threads_(torch::stable::get_num_threads()) {}

  // The next piece; none is left if false.
  bool take(int64_t& begin, int64_t& end) {
    begin = next_.load(std::memory_order_relaxed);
    do {
      if (begin >= count_) return false;
      end = std::min(count_, begin + std::max(least_, (count_ - begin) / threads_ * 3 / 4));
    } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_, least_, threads_;
};

// Calls work(pieces) on all threads.
template <class Work>
void share(int64_t count, int64_t least, const Work& work) {
  Pieces pieces(count, least);
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) { work(pieces); });
}

// The processor fetches some bytes into its second-level cache in the meantime.
inline void fetch(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(from) + i, _MM_HINT_T1);
}

inline std::vector<int64_t> sizes(const Tensor& x) {
  std::vector<int64_t> all;
  for (int64_t d = 0; d < x.dim(); d++) all.push_back(x.size(d));
  return all;
}

// A tensor without values, of a type and place like another's. PyTorch's own `new_empty` is looked up by name at every
// call, which takes longer than a small product.
inline Tensor blank(const std::vector<int64_t>& sizes, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor in_order(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline int64_t pieces_of(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// The first `left` of 16, of 32 or of 64.
inline __mmask16 first16(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }
inline __mmask32 first32(int64_t left) { return left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1; }
inline __mmask64 first64(int64_t left) { return left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1; }

// Sixteen activations, zeros from the `left`-th on, as float32.
inline __m512 load(const float* x, int64_t left) { return _mm512_maskz_loadu_ps(first16(left), x); }
inline __m512 load(const uint16_t* x, int64_t left) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first16(left), x);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// The nearest bfloat16, ties to even; what is not a number stays so.
inline __m512 rounded(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  sum = _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  return _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

inline void store(float* y, __m512 values, __mmask16 here) { _mm512_mask_storeu_ps(y, here, values); }
inline void store(uint16_t* y, __m512 values, __mmask16 here) {
  const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(rounded(values)), 16);
  _mm256_mask_storeu_epi16(y, here, _mm512_cvtepi32_epi16(bits));
}

// Sixteen activations rounded to bytes, written to `out`; and returned.
inline __m512i to_bytes(__m512 x, __m512 inverse, int8_t* out) {
  const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));  // to nearest, ties to even
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(q));
  return q;
}

// -factor * sum; of activations that are no numbers the sum is nonsense, and the product must not be undefined.
inline int32_t less(uint32_t factor, int32_t sum) { return static_cast<int32_t>(-factor * static_cast<uint32_t>(sum)); }

// e to the power of x: 2^n times a polynomial in what remains, to about float32's last bit.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // in this order: what is not a number stays so
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);  // ln 2 in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// The largest magnitude of some activations. Compared as integers: in that order what is not a number is larger than
// any number, and shows in the result instead of being lost.
class Largest {
 public:
  void add(__m512 x) { most_ = _mm512_max_epi32(most_, _mm512_castps_si512(_mm512_abs_ps(x))); }
  float value() const {
    return _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(most_))));
  }

 private:
  __m512i most_ = _mm512_castps_si512(_mm512_set1_ps(1e-20f));  // rows of zeros have a scale too
};

// Sixteen registers of sixteen words, turned: word i of register j becomes word j of register i.
inline void turn(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

}  // namespace
