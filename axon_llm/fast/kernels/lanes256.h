// Lanes as two registers of AVX2: see lanes.h.

#pragma once

#include <algorithm>

#include "lanes.h"

namespace {

constexpr bool HELD = false;

struct Floats {
  __m256 low, high;
};
struct Words {  // or 32 shorts, or 64 bytes
  __m256i low, high;
};

inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Words all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Words as_words(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline Floats as_floats(Words x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
inline Floats converted(Words x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Words nearest(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }  // ties to even

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fma(Floats a, Floats b, Floats c) {  // a b + c
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fms(Floats a, Floats b, Floats c) {  // a b - c
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {  // c - a b
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats larger(Floats a, Floats b) {  // b if either is none
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Floats whole(Floats x) {
  constexpr int HOW = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, HOW), _mm256_round_ps(x.high, HOW)};
}

inline Words operator+(Words a, Words b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Words operator-(Words a, Words b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
inline Words operator&(Words a, Words b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
inline Words operator|(Words a, Words b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
inline Words operator<<(Words a, int n) { return {_mm256_slli_epi32(a.low, n), _mm256_slli_epi32(a.high, n)}; }
inline Words operator>>(Words a, int n) { return {_mm256_srli_epi32(a.low, n), _mm256_srli_epi32(a.high, n)}; }
inline Words larger(Words a, Words b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }

// x 2^n, in two steps: neither power alone is beyond what float32 holds.
inline Floats times_power(Floats x, Floats n) {
  constexpr float MOST = 250;  // more makes no difference
  n = {_mm256_min_ps(_mm256_set1_ps(MOST), n.low), _mm256_min_ps(_mm256_set1_ps(MOST), n.high)};
  const Words all_of_it = nearest(n);
  const Words half{_mm256_srai_epi32(all_of_it.low, 1), _mm256_srai_epi32(all_of_it.high, 1)};
  const Floats one = as_floats((half + all(127)) << 23), two = as_floats((all_of_it - half + all(127)) << 23);
  return x * one * two;
}
inline Floats below(Floats x) { return {_mm256_floor_ps(x.low), _mm256_floor_ps(x.high)}; }
inline Floats times_power_below(Floats x, Floats n) { return times_power(x, below(n)); }  // x 2^⌊n⌋
inline Floats fraction(Floats x) { return x - below(x); }
inline bool any_larger(Floats a, Floats b) {
  const __m256 low = _mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), high = _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ);
  return _mm256_movemask_ps(_mm256_or_ps(low, high)) != 0;
}

// Over all sixteen, in the order in which a register of AVX-512 is halved.
inline float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.high, x.low);
  const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_add_ps(_mm_movehl_ps(four, four), four);
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.high, x.low);
  const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_max_ps(_mm_movehl_ps(four, four), four);
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline int32_t sum(Words x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}
inline int32_t largest(Words x) {
  const __m256i eight = _mm256_max_epi32(x.low, x.high);
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
  return std::max(_mm_cvtsi128_si32(two), _mm_extract_epi32(two, 1));
}

// x where a bit says so, else the other.
inline __m256 choose(uint32_t bits, __m256 x, __m256 other) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each), each);
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(set));
}
inline Floats choose(uint16_t bits, Floats x, Floats other) {
  return {choose(bits, x.low, other.low), choose(static_cast<uint32_t>(bits >> 8), x.high, other.high)};
}
inline __m256i where_no_number(__m256 x, __m256i then, __m256i other) {
  const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(other, then, none);
}
inline Words where_no_number(Floats x, Words then, Words other) {
  return {where_no_number(x.low, then.low, other.low), where_no_number(x.high, then.high, other.high)};
}

// What is computed here and now: without it, GCC takes all products of a block before it adds any, or widens all its
// weights before it multiplies any, and has no registers to put them in.
inline Floats now(Floats x) {
  asm("" : "+x"(x.low), "+x"(x.high));
  return x;
}
inline Words now(Words x) {
  asm("" : "+x"(x.low), "+x"(x.high));
  return x;
}

// From memory and to it, wherever it begins.
inline const __m256i* registers(const void* p) { return static_cast<const __m256i*>(p); }
inline __m256i* registers(void* p) { return static_cast<__m256i*>(p); }
inline Words words_at(const void* p) {
  return {_mm256_loadu_si256(registers(p)), _mm256_loadu_si256(registers(p) + 1)};
}
inline Floats floats_at(const void* p) { return as_floats(words_at(p)); }
inline void put(void* p, Words x) {
  _mm256_storeu_si256(registers(p), x.low);
  _mm256_storeu_si256(registers(p) + 1, x.high);
}
inline void put(void* p, Floats x) { put(p, as_words(x)); }

// What there is of `COUNT` numbers, and zeros from the `left`-th on.
template <int64_t COUNT, class T>
struct Filled {
  alignas(64) T values[COUNT] = {};
  Filled(const T* x, int64_t left) {
    if (left > 0) std::memcpy(values, x, static_cast<size_t>(std::min(left, COUNT)) * sizeof(T));
  }
};

// Zeros from the `left`-th on: sixteen activations; sixteen words; 32 shorts; and which of 64 bytes are not zero.
inline Floats load(const float* x, int64_t left) {
  return left >= 16 ? floats_at(x) : floats_at(Filled<16, float>(x, left).values);
}
inline Floats load(const uint16_t* x, int64_t left) {
  if (left < 16) return load(Filled<16, uint16_t>(x, left).values, 16);
  const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x) + 1));
  return as_floats(Words{low, high} << 16);
}
inline Words words_at(const int32_t* x, int64_t left) {
  return left >= 16 ? words_at(x) : words_at(Filled<16, int32_t>(x, left).values);
}
inline Words shorts_at(const uint16_t* x, int64_t left) {
  return left >= 32 ? words_at(x) : words_at(Filled<32, uint16_t>(x, left).values);
}
inline uint64_t set_at(const uint8_t* x, int64_t left) {
  if (left < 64) return set_at(Filled<64, uint8_t>(x, left).values, 64);
  const auto zeros = [&](int i) {
    const __m256i bytes = _mm256_loadu_si256(registers(x) + i);
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
  };
  return ~(static_cast<uint64_t>(zeros(1)) << 32 | zeros(0));
}

// Sixteen words as shorts, as near as shorts come; in order.
inline __m256i signed_shorts(Words x) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8); }

// The first `left` of sixteen: as they are; the lower halves of words; and all sixteen as bytes, as near as bytes come.
inline void store(float* y, Floats values, int64_t left) {
  if (left >= 16) return put(y, values);
  float all_of_them[16];
  put(all_of_them, values);
  if (left > 0) std::memcpy(y, all_of_them, static_cast<size_t>(left) * sizeof(float));
}
inline void put_shorts(uint16_t* y, Words x, int64_t left) {
  const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.low, x.high), 0xd8);
  if (left >= 16) return _mm256_storeu_si256(registers(y), shorts);
  uint16_t all_of_them[16];
  _mm256_storeu_si256(registers(all_of_them), shorts);
  if (left > 0) std::memcpy(y, all_of_them, static_cast<size_t>(left) * sizeof(uint16_t));
}
inline void put_bytes(void* y, Words x) {
  const __m256i shorts = signed_shorts(x);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
  _mm_storeu_si128(static_cast<__m128i*>(y), bytes);
}

// The lower halves of two registers, and the upper ones.
inline Words by_halves(__m256i a, __m256i b) {
  return {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
}
inline Floats by_halves(__m256 a, __m256 b) {
  return as_floats(by_halves(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}

// Pairs of a short of `even` and one of `odd`: of the first sixteen, and of the others.
inline Words pair_up(__m256i even, __m256i odd) {
  return by_halves(_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd));
}
inline void pair_up(Words even, Words odd, Words& low, Words& high) {
  low = pair_up(even.low, odd.low);
  high = pair_up(even.high, odd.high);
}

// Numbers of `even` and of `odd` by turns: of the first eight of both, and of the others.
inline Floats zip(__m256 even, __m256 odd) {
  return by_halves(_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
}
inline void zip(Floats even, Floats odd, Floats& low, Floats& high) {
  low = zip(even.low, odd.low);
  high = zip(even.high, odd.high);
}

// Sixteen bytes of memory, four times: the registers' quarters.
inline Words spread(const void* p) {
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  return {both, both};
}

// Of each quarter of four registers its sum, side by side: the first register's, the second's, …; (0 + 2) + (1 + 3).
inline __m256 sums_of_four(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256d one = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
  const __m256d two = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
  const __m256d even = _mm256_unpacklo_pd(one, two), odd = _mm256_unpackhi_pd(one, two);
  return _mm256_add_ps(_mm256_castpd_ps(even), _mm256_castpd_ps(odd));
}
inline Floats sums_of_four(const Floats* x) {
  return {sums_of_four(x[0].low, x[1].low, x[2].low, x[3].low),
          sums_of_four(x[0].high, x[1].high, x[2].high, x[3].high)};
}

// Four times four quarters, turned: quarter i of the j-th becomes quarter j of the i-th.
inline void turn_quarters(Floats* x) {
  const Floats a = by_halves(x[0].low, x[1].low), b = by_halves(x[2].low, x[3].low);
  const Floats c = by_halves(x[0].high, x[1].high), d = by_halves(x[2].high, x[3].high);
  x[0] = {a.low, b.low}, x[1] = {a.high, b.high};
  x[2] = {c.low, d.low}, x[3] = {c.high, d.high};
}

// Sixteen Words, turned: word i of the j-th becomes word j of the i-th. By quarters of eight times eight.
inline void turn_quarter(__m256i* r) {
  __m256i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const Words both = by_halves(r[i], r[i + 4]);
    t[i] = both.low, t[i + 4] = both.high;
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = t[i];
}
inline void turn(Words* words) {
  __m256i quarters[4][8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    quarters[0][i] = words[i].low, quarters[1][i] = words[i + 8].low;
    quarters[2][i] = words[i].high, quarters[3][i] = words[i + 8].high;
  }
  for (auto& quarter : quarters) turn_quarter(quarter);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    words[i] = {quarters[0][i], quarters[1][i]};
    words[i + 8] = {quarters[2][i], quarters[3][i]};
  }
}

// sums + products of four unsigned bytes of each word with four signed ones, which `x` points to: as shorts, for the
// products of bytes would not fit in the shorts that this processor adds them up in.
constexpr int64_t FOUR = 2;  // words that four signed bytes take: the first and third, the second and fourth
struct Fours {
  Words even, odd;
};
inline Fours fours(Words w) {
  return {w & all(0x00ff00ff), {_mm256_srli_epi16(w.low, 8), _mm256_srli_epi16(w.high, 8)}};
}
template <bool>
inline Words add_fours(Words sums, const Fours& w, const int32_t* x) {
  const __m256i one = _mm256_set1_epi32(x[0]), two = _mm256_set1_epi32(x[1]);
  sums = now(sums + Words{_mm256_madd_epi16(w.even.low, one), _mm256_madd_epi16(w.even.high, one)});
  return now(sums + Words{_mm256_madd_epi16(w.odd.low, two), _mm256_madd_epi16(w.odd.high, two)});
}
inline void put_fours(int32_t* words, int64_t k, Words x) {
  const __m256i shorts = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(signed_shorts(x), 0xd8), 0xd8);
  _mm256_storeu_si256(registers(words + k / 2), shorts);
}

// The same for half bytes 0 … 15, of which up to 32 for each channel are summed before they are `gathered`: in shorts,
// where 8 * 2 * 15 * 127 still fits. What the sum begins with may not.
inline Words halves_from(int32_t) { return all(0); }
template <bool>
inline Words add_halves(Words sums, Words w, const int32_t* x) {
  const __m256i four = _mm256_set1_epi32(*x);
  return now(Words{_mm256_add_epi16(sums.low, _mm256_maddubs_epi16(w.low, four)),
                   _mm256_add_epi16(sums.high, _mm256_maddubs_epi16(w.high, four))});
}
inline Words gathered(Words sums, int32_t start) {
  const __m256i ones = _mm256_set1_epi16(1);
  return Words{_mm256_madd_epi16(sums.low, ones), _mm256_madd_epi16(sums.high, ones)} + all(start);
}

}  // namespace
