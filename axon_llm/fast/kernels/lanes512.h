// Lanes as one register of AVX-512: see lanes.h.

#pragma once

#include "lanes.h"

namespace {

constexpr bool HELD = true;

struct Floats {
  __m512 v;
};
struct Words {  // or 32 shorts, or 64 bytes
  __m512i v;
};

inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
inline Words all(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Words as_words(Floats x) { return {_mm512_castps_si512(x.v)}; }
inline Floats as_floats(Words x) { return {_mm512_castsi512_ps(x.v)}; }
inline Floats converted(Words x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline Words nearest(Floats x) { return {_mm512_cvtps_epi32(x.v)}; }  // ties to even

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
inline Floats fms(Floats a, Floats b, Floats c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }    // a b - c
inline Floats fnma(Floats a, Floats b, Floats c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }                  // b if either is none
inline Floats whole(Floats x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats times_power(Floats x, Floats n) { return {_mm512_scalef_ps(x.v, n.v)}; }       // x 2^n
inline Floats times_power_below(Floats x, Floats n) { return times_power(x, n); }            // x 2^⌊n⌋
inline Floats fraction(Floats x) { return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF)}; }  // x - ⌊x⌋, 0 of infinity
inline bool any_larger(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x.v); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x.v); }

inline Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Words operator&(Words a, Words b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Words operator|(Words a, Words b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Words operator<<(Words a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
inline Words operator>>(Words a, int n) { return {_mm512_srli_epi32(a.v, n)}; }
inline Words larger(Words a, Words b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline int32_t sum(Words x) { return _mm512_reduce_add_epi32(x.v); }
inline int32_t largest(Words x) { return _mm512_reduce_max_epi32(x.v); }

// The first `left` of 16, of 32 or of 64, as bits.
inline __mmask16 first16(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }
inline __mmask32 first32(int64_t left) { return left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1; }
inline __mmask64 first64(int64_t left) { return left >= 64 ? ~0ull : left <= 0 ? 0 : (1ull << left) - 1; }

// x where a bit says so, else the other.
inline Floats choose(uint16_t bits, Floats x, Floats other) { return {_mm512_mask_mov_ps(other.v, bits, x.v)}; }
inline Words where_no_number(Floats x, Words then, Words other) {
  return {_mm512_mask_mov_epi32(other.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), then.v)};
}

// What is computed here and now, and kept in a register: see lanes256.h.
inline Floats now(Floats x) {
  asm("" : "+v"(x.v));
  return x;
}
inline Words now(Words x) {
  asm("" : "+v"(x.v));
  return x;
}

// From memory and to it, wherever it begins.
inline Floats floats_at(const void* p) { return {_mm512_loadu_ps(p)}; }
inline Words words_at(const void* p) { return {_mm512_loadu_si512(p)}; }
#define AXON_IN_TURN
// … loaded here and now, after what was loaded, or computed by asm, before: compilers like another order.
inline Words words_in_turn(const void* p) {
  Words found;
  asm volatile("vmovdqu64 %1, %0" : "=v"(found.v) : "m"(*static_cast<const __m512i_u*>(p)));
  return found;
}
inline void put(void* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline void put(void* p, Words x) { _mm512_storeu_si512(p, x.v); }

// Zeros from the `left`-th on: sixteen activations; sixteen words; 32 shorts; and which of 64 bytes are not zero.
inline Floats load(const float* x, int64_t left) { return {_mm512_maskz_loadu_ps(first16(left), x)}; }
inline Floats load(const uint16_t* x, int64_t left) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first16(left), x);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Words words_at(const int32_t* x, int64_t left) { return {_mm512_maskz_loadu_epi32(first16(left), x)}; }
inline Words shorts_at(const uint16_t* x, int64_t left) { return {_mm512_maskz_loadu_epi16(first32(left), x)}; }
inline uint64_t set_at(const uint8_t* x, int64_t left) {
  const __m512i bytes = _mm512_maskz_loadu_epi8(first64(left), x);
  return _mm512_test_epi8_mask(bytes, bytes);
}

// The first `left` of sixteen: as they are; the lower halves of words; and all sixteen as bytes, as near as bytes come.
inline void store(float* y, Floats values, int64_t left) { _mm512_mask_storeu_ps(y, first16(left), values.v); }
inline void put_shorts(uint16_t* y, Words x, int64_t left) {
  _mm256_mask_storeu_epi16(y, first16(left), _mm512_cvtepi32_epi16(x.v));
}
inline void put_bytes(void* y, Words x) { _mm_storeu_si128(static_cast<__m128i*>(y), _mm512_cvtsepi32_epi8(x.v)); }

// Pairs of a short of `even` and one of `odd`: of the first sixteen, and of the others.
inline void pair_up(Words even, Words odd, Words& low, Words& high) {
  alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(LOW), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  low = {_mm512_permutex2var_epi16(even.v, first, odd.v)};
  high = {_mm512_permutex2var_epi16(even.v, second, odd.v)};
}

// Sixteen Words, turned: word i of the j-th becomes word j of the i-th.
inline void turn(Words* words) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = now(words[i]).v;  // or GCC 12 keeps some in memory for a while
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
    words[i].v = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    words[i + 8].v = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Numbers of `even` and of `odd` by turns: of the first eight of both, and of the others.
inline void zip(Floats even, Floats odd, Floats& low, Floats& high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = {_mm512_permutex2var_ps(even.v, first, odd.v)};
  high = {_mm512_permutex2var_ps(even.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd.v)};
}

// Sixteen bytes of memory, four times: a register's quarters.
inline Words spread(const void* p) { return {_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }

// Of each quarter of four registers its sum, side by side: the first register's, the second's, …; (0 + 2) + (1 + 3).
inline Floats sums_of_four(const Floats* x) {
  const auto halves = [&](int i) {
    return _mm512_add_ps(_mm512_unpacklo_ps(x[i].v, x[i + 1].v), _mm512_unpackhi_ps(x[i].v, x[i + 1].v));
  };
  const __m512d one = _mm512_castps_pd(halves(0)), two = _mm512_castps_pd(halves(2));
  const __m512d even = _mm512_unpacklo_pd(one, two), odd = _mm512_unpackhi_pd(one, two);
  return {_mm512_add_ps(_mm512_castpd_ps(even), _mm512_castpd_ps(odd))};
}

// Four registers of four quarters, turned: quarter i of the j-th becomes quarter j of the i-th.
inline void turn_quarters(Floats* x) {
  const auto halves = [&](int i, bool upper) {
    return upper ? _mm512_shuffle_f32x4(x[i].v, x[i + 1].v, 0xee) : _mm512_shuffle_f32x4(x[i].v, x[i + 1].v, 0x44);
  };
  const __m512 a = halves(0, false), b = halves(0, true), c = halves(2, false), d = halves(2, true);
  x[0].v = _mm512_shuffle_f32x4(a, c, 0x88);
  x[1].v = _mm512_shuffle_f32x4(a, c, 0xdd);
  x[2].v = _mm512_shuffle_f32x4(b, d, 0x88);
  x[3].v = _mm512_shuffle_f32x4(b, d, 0xdd);
}

#ifdef AXON_TILES
// The first `left` of 32 shorts.
inline void put_shorts_at(uint16_t* y, Words x, int64_t left) { _mm512_mask_storeu_epi16(y, first32(left), x.v); }

// Four columns of sixteen rows, each `step` from the one before, turned.
inline void turn_four(const float* from, int64_t step, Floats* to) {
  __m512 x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // rows i, 4 + i, 8 + i, 12 + i
    const auto four = [&](int row) { return _mm_loadu_ps(from + (row + i) * step); };
    x[i] = _mm512_insertf32x4(_mm512_castps128_ps512(four(0)), four(4), 1);
    x[i] = _mm512_insertf32x4(_mm512_insertf32x4(x[i], four(8), 2), four(12), 3);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const auto pairs = [&](int j) {
      return i == 0 ? _mm512_unpacklo_ps(x[j], x[j + 1]) : _mm512_unpackhi_ps(x[j], x[j + 1]);
    };
    const __m512d one = _mm512_castps_pd(pairs(0)), two = _mm512_castps_pd(pairs(2));
    to[2 * i].v = _mm512_castpd_ps(_mm512_unpacklo_pd(one, two));
    to[2 * i + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(one, two));
  }
}
#endif

#ifdef __GFNI__
#define AXON_HIGH_HALVES
// The upper half of each byte by one instruction instead of two: a matrix of bits times each byte. Row 7 - i of it says
// which bits make bit i: bit i + 4 alone, and none for the last four.
inline Words high_halves(Words w) {
  return {_mm512_gf2p8affine_epi64_epi8(w.v, _mm512_set1_epi64(0x1020408000000000), 0)};
}
#endif

#ifdef __AVX512BF16__
#define AXON_PAIRS
#define AXON_STORE
// By an instruction, to which numbers smaller than any normal one are zeros.
inline void store(uint16_t* y, Floats values, int64_t left) {
  _mm256_mask_storeu_epi16(y, first16(left), (__m256i)_mm512_cvtneps_pbh(values.v));
}
// sums + products of pairs of bfloat16, or of pairs and the one that `x` points to. What is wanted `ONCE` the
// instruction reads itself: the fewer instructions there are, the more reads of weights are under way.
inline Floats add_pairs(Floats sums, Words w, Words x) {
  return {_mm512_dpbf16_ps(sums.v, (__m512bh)w.v, (__m512bh)x.v)};
}
template <bool ONCE>
inline Floats add_pairs(Floats sums, Words w, const int32_t* x) {
  if constexpr (!ONCE) return add_pairs(sums, w, all(*x));
  asm volatile("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sums.v) : "v"(w.v), "m"(*x));
  return sums;
}
#endif

// sums + products of four unsigned bytes of each word with four signed ones, which `x` points to.
constexpr int64_t FOUR = 1;  // words that four signed bytes take
using Fours = Words;
inline Fours fours(Words w) { return w; }
template <bool ONCE>
inline Words add_fours(Words sums, Fours w, const int32_t* x) {
  if constexpr (!ONCE) return {_mm512_dpbusd_epi32(sums.v, w.v, _mm512_set1_epi32(*x))};
  asm volatile("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums.v) : "v"(w.v), "m"(*x));
  return sums;
}
inline void put_fours(int32_t* words, int64_t k, Words x) { put_bytes(reinterpret_cast<int8_t*>(words) + k, x); }

// The same for half bytes 0 … 15, of which up to 32 for each channel are summed before they are `gathered`.
inline Words halves_from(int32_t start) { return all(start); }
template <bool ONCE>
inline Words add_halves(Words sums, Words w, const int32_t* x) {
  return add_fours<ONCE>(sums, w, x);
}
inline Words gathered(Words sums, int32_t) { return sums; }

}  // namespace
