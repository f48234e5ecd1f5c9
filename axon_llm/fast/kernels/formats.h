// What is in a strip, and how rows are multiplied by it: bfloat16 in pairs or widened, int8, int4.
//
// Each format says how activations are prepared, how a block is loaded, how ROWS rows are multiplied by it, and how a
// sum becomes a result.
//
// Read next: tiles.h.

#pragma once

#include "strips.h"

namespace {

// bfloat16 weights and activations; products of pairs, summed in float32.
struct Pairs {
  static constexpr bool ALONE = true;                              // one row is multiplied faster in a loop of its own
  static constexpr int64_t INPUTS = 32, WORDS = 16, BYTES = 1024;  // of a block: input channels, words of a row, bytes
  using Sum = __m512;

  struct Block {
    __m512i w[16];
    explicit Block(const uint8_t* p) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) w[i] = _mm512_loadu_si512(p + 64 * i);
    }
  };

  static void prepare(const uint16_t* x, int64_t R, int64_t K, int64_t blocks, Activations& a) {
    if (a.rows == 1 && K % INPUTS == 0) {
      a.words = reinterpret_cast<const int32_t*>(x);
      return;
    }
    int32_t* words = a.allocate(blocks * a.rows * WORDS);
    torch::stable::parallel_for(0, R, 16, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < blocks; b++) {
        const __mmask32 here = first32(K - b * INPUTS);
        for (int64_t r = begin; r < end; r++)
          _mm512_storeu_si512(words + (b * a.rows + r) * WORDS, _mm512_maskz_loadu_epi16(here, x + r * K + b * INPUTS));
      }
    });
  }

  static Sum first(const Activations&, int64_t) { return _mm512_setzero_ps(); }

#ifdef __AVX512BF16__
  template <int ROWS>
  static inline void multiply(const Block& block, const Activations& a, int64_t at, Sum* sums) {
    const int32_t* x = a.words + at * WORDS;
    __m512 even[ROWS], odd[ROWS];  // two sums, begun anew: neither waits for the other, nor for the block before
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) even[r] = odd[r] = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const __m512i one = _mm512_set1_epi32(x[r * WORDS + i]), two = _mm512_set1_epi32(x[r * WORDS + i + 1]);
        even[r] = _mm512_dpbf16_ps(even[r], (__m512bh)block.w[i], (__m512bh)one);
        odd[r] = _mm512_dpbf16_ps(odd[r], (__m512bh)block.w[i + 1], (__m512bh)two);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) sums[r] = _mm512_add_ps(sums[r], _mm512_add_ps(even[r], odd[r]));
  }
#endif

  static __m512 finish(Sum sum, const Activations&, int64_t, const float*) { return sum; }
};

// The same, multiplied in float32: for processors without the instruction, or where it is slow.
struct WidePairs : Pairs {
  static constexpr int64_t WORDS = 32;

  static void prepare(const uint16_t* x, int64_t R, int64_t K, int64_t blocks, Activations& a) {
    float* words = reinterpret_cast<float*>(a.allocate(blocks * a.rows * WORDS));
    torch::stable::parallel_for(0, R, 16, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t r = begin; r < end; r++)
          for (int64_t k = 0; k < INPUTS; k += 16) {
            const int64_t from = b * INPUTS + k;
            _mm512_storeu_ps(words + (b * a.rows + r) * WORDS + k, load(x + r * K + from, K - from));
          }
    });
  }

  template <int ROWS>
  static inline void multiply(const Block& block, const Activations& a, int64_t at, Sum* sums) {
    const float* x = reinterpret_cast<const float*>(a.words) + at * WORDS;
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    __m512 even[ROWS], odd[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) even[r] = odd[r] = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      const __m512 one = _mm512_castsi512_ps(_mm512_slli_epi32(block.w[i], 16));
      const __m512 two = _mm512_castsi512_ps(_mm512_and_si512(block.w[i], upper));
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        even[r] = _mm512_fmadd_ps(one, _mm512_set1_ps(x[r * WORDS + 2 * i]), even[r]);
        odd[r] = _mm512_fmadd_ps(two, _mm512_set1_ps(x[r * WORDS + 2 * i + 1]), odd[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) sums[r] = _mm512_add_ps(sums[r], _mm512_add_ps(even[r], odd[r]));
  }
};

// Sixteen rows of bfloat16 become a block: `count` of them, the others and what is past the `left`-th channel are
// zeros.
inline void lay_block(const uint16_t* rows, int64_t stride, int64_t count, int64_t left, uint8_t* block) {
  const __mmask32 here = first32(left);
  __m512i words[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; i++) words[i] = _mm512_maskz_loadu_epi16(i < count ? here : 0, rows + i * stride);
  turn(words);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_store_si512(block + 64 * i, words[i]);
}

// int8 weights; activations rounded with a scale for each row. Sums are exact.
struct Int8 {
  static constexpr bool ALONE = true;
  static constexpr int64_t INPUTS = 64, WORDS = 16, BYTES = 1024;
  using Sum = __m512i;
  using Block = Pairs::Block;

  template <class X>
  static void prepare(const X* x, int64_t R, int64_t K, int64_t blocks, Activations& a) {
    int32_t* words = a.allocate(blocks * a.rows * WORDS);
    a.scale.resize(R), a.start.resize(R);
    torch::stable::parallel_for(0, R, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const X* row = x + r * K;
        Largest most;
        for (int64_t k = 0; k < K; k += 16) most.add(load(row + k, K - k));
        const float largest = most.value();
        const __m512 inverse = _mm512_set1_ps(127.0f / largest);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = 0; k < blocks * INPUTS; k += 16) {
          int8_t* out = reinterpret_cast<int8_t*>(words + (k / INPUTS * a.rows + r) * WORDS) + k % INPUTS;
          sum = _mm512_add_epi32(sum, to_bytes(load(row + k, K - k), inverse, out));
        }
        a.scale[r] = largest / 127.0f;
        a.start[r] = less(128, _mm512_reduce_add_epi32(sum));  // the weights' bytes are 128 too large
      }
    });
  }

  static Sum first(const Activations& a, int64_t r) { return _mm512_set1_epi32(a.start[r]); }

  template <int ROWS>
  static inline void multiply(const Block& block, const Activations& a, int64_t at, Sum* sums) {
    const int32_t* x = a.words + at * WORDS;
    __m512i even[ROWS], odd[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) even[r] = odd[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        even[r] = _mm512_dpbusd_epi32(even[r], block.w[i], _mm512_set1_epi32(x[r * WORDS + i]));
        odd[r] = _mm512_dpbusd_epi32(odd[r], block.w[i + 1], _mm512_set1_epi32(x[r * WORDS + i + 1]));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) sums[r] = _mm512_add_epi32(sums[r], _mm512_add_epi32(even[r], odd[r]));
  }

  static __m512 finish(Sum sum, const Activations& a, int64_t r, const float* scale) {
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(a.scale[r])), _mm512_loadu_ps(scale));
  }
};

// int4 weights, w = (q − 8) · scale + middle; activations rounded with a scale for each row and group.
struct Int4 {
  static constexpr bool ALONE = false;
  static constexpr int64_t INPUTS = 2 * GROUP, WORDS = 16, BYTES = 640;  // two groups, 256 + 64 bytes each
  using Sum = __m512;

  struct Block {
    __m512i w[16];
    __m512 scale[2], middle[2];
    explicit Block(const uint8_t* p) {
      const __m512i low = _mm512_set1_epi8(15), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++, p += 320) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const __m512i halves = _mm512_loadu_si512(p + 64 * i);
          w[8 * g + 2 * i] = _mm512_and_si512(halves, low);
          w[8 * g + 2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(halves, 4), low);
        }
        const __m512i factors = _mm512_loadu_si512(p + 256);
        scale[g] = _mm512_castsi512_ps(_mm512_slli_epi32(factors, 16));
        middle[g] = _mm512_castsi512_ps(_mm512_and_si512(factors, upper));
      }
    }
  };

  template <class X>
  static void prepare(const X* x, int64_t R, int64_t K, int64_t blocks, Activations& a) {
    int32_t* words = a.allocate(blocks * a.rows * WORDS);
    const int64_t groups = 2 * blocks * a.rows;
    a.scale.resize(groups), a.sum.resize(groups), a.start.resize(groups);
    torch::stable::parallel_for(0, R, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        for (int64_t k = 0; k < blocks * INPUTS; k += GROUP) {
          const __m512 one = load(x + r * K + k, K - k), two = load(x + r * K + k + 16, K - k - 16);
          Largest most;
          most.add(one), most.add(two);
          const float largest = most.value();
          const __m512 inverse = _mm512_set1_ps(127.0f / largest);
          const int64_t at = k / INPUTS * a.rows + r, group = 2 * at + k / GROUP % 2;
          int8_t* out = reinterpret_cast<int8_t*>(words + at * WORDS) + k % INPUTS;
          const __m512i both = _mm512_add_epi32(to_bytes(one, inverse, out), to_bytes(two, inverse, out + 16));
          const int32_t sum = _mm512_reduce_add_epi32(both);
          a.scale[group] = largest / 127.0f;
          a.sum[group] = a.scale[group] * static_cast<float>(sum);
          a.start[group] = less(8, sum);  // the weights' half bytes are 8 too large
        }
    });
  }

  static Sum first(const Activations&, int64_t) { return _mm512_setzero_ps(); }

  template <int ROWS>
  static inline void multiply(const Block& block, const Activations& a, int64_t at, Sum* sums) {
    const int32_t *x = a.words + at * WORDS, *start = a.start.data() + 2 * at;
    const float *scale = a.scale.data() + 2 * at, *sum = a.sum.data() + 2 * at;
    __m512i products[ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++) products[r][g] = _mm512_set1_epi32(start[2 * r + g]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
          const __m512i four = _mm512_set1_epi32(x[r * WORDS + 8 * g + i]);
          products[r][g] = _mm512_dpbusd_epi32(products[r][g], block.w[8 * g + i], four);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      __m512 groups[2];
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++) {
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(products[r][g]), block.scale[g]);
        groups[g] = _mm512_mul_ps(block.middle[g], _mm512_set1_ps(sum[2 * r + g]));
        groups[g] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(scale[2 * r + g]), groups[g]);
      }
      sums[r] = _mm512_add_ps(sums[r], _mm512_add_ps(groups[0], groups[1]));
    }
  }

  static __m512 finish(Sum sum, const Activations&, int64_t, const float*) { return sum; }
};

// sums += `rows` rows of a block of activations, from place `at` on, times a block of weights.
template <class Format>
inline void multiply_rows(const typename Format::Block& block, const Activations& a, int64_t at, int64_t rows,
                          typename Format::Sum* sums) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) Format::template multiply<4>(block, a, at + r, sums + r);
  for (; r < rows; r++) Format::template multiply<1>(block, a, at + r, sums + r);
}

}  // namespace
