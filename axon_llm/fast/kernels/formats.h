// What is in a strip, and how rows are multiplied by it: bfloat16 in pairs or widened, int8, int4.
//
// Each format says how activations are prepared, how a block is loaded, how ROWS rows are multiplied by it, or by the
// blocks of two strips, and how a sum becomes a result. Multiplying is always inline: in a call of its own a block that
// was loaded goes through memory, and one row of int4 took twice as long.
//
// Read next: rows.h.

#pragma once

#include "strips.h"

namespace {

// Sums that a row is taken in by turns, begun anew in every block: neither waits for the other, nor for the block
// before. Where registers are few, several rows are enough that do not wait for each other.
template <int ROWS>
constexpr int TURNS = HELD || ROWS <= 2 ? 2 : 1;

// Of a block: all where they are in registers. Where not, more than two are more code than is quick to run, and half as
// fast.
constexpr int WORDS_AT_ONCE = HELD ? 16 : 2;

// Whether two words come of a line.
template <class Format>
constexpr bool SHARED = Format::line(0) == Format::line(1);

// Word i of a block, as it is multiplied: what a format makes of one of the block's lines.
template <class Format>
inline auto word_at(const uint8_t* block, int i) {
  const Words line = words_at(block + Format::line(i));
  return Format::word(SHARED<Format> ? now(line) : line, i);
}

// A block's sixteen words from where it begins, and what else is in it: all of them loaded, or each when it is wanted.
// If `prefetched`, so is the block AHEAD: words are then loaded two by two, from front to back, and as many lines of
// that block are prefetched after each two. Where memory is slow, Zen 5 reads at 0.7 to 0.8 of its rate if all words
// are loaded first, or in another order.
template <class Format>
class Loaded {
 public:
  [[gnu::always_inline]] explicit Loaded(const uint8_t* p, bool prefetched = false) : begin_(p) {
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      words_[i] = word_at<Format>(p, i), words_[i + 1] = word_at<Format>(p, i + 1);
      if (!HELD || !prefetched) continue;
      const int from = i * LINES / 16, to = (i + 2) * LINES / 16;
      prefetch<AHEAD_INTO>(p + AHEAD + 64 * from, 64 * (to - from));
      asm volatile("" : "+r"(p));  // what is loaded next is not loaded before
    }
    if (!HELD && prefetched) prefetch<AHEAD_INTO>(p + AHEAD, Format::BYTES);
  }
  const auto& word(int, int i) const { return words_[i]; }
  Words at(int, int64_t offset) const { return now(words_at(begin_ + offset)); }
  Loaded again() const { return *this; }  // by value: for a reference GCC stores all words, though nobody reads them

 private:
  static constexpr int LINES = Format::BYTES / 64;
  const uint8_t* begin_;
  decltype(word_at<Format>(nullptr, 0)) words_[16];
};
template <class Format>
class InPlace {
 public:
  explicit InPlace(const uint8_t* p, bool prefetched = false) : begin_(p) {
    if (prefetched) prefetch<AHEAD_INTO>(p + AHEAD, Format::BYTES);
  }
  auto word(int, int i) const { return word_at<Format>(begin_, i); }
  Words at(int, int64_t offset) const { return now(words_at(begin_ + offset)); }

  // The same for other rows, and not to be read before: GCC would widen the weights once for all rows, and keep them
  // where it takes as long to read them.
  InPlace again() const {
    const uint8_t* p = begin_;
    asm volatile("" : "+r"(p));
    return InPlace(p);
  }

 private:
  const uint8_t* const begin_;
};

// … each line when it is wanted, and none before or after: rows that are multiplied at once. GCC would load some lines
// early and some late. From front to back, each multiplied before the next is loaded, Zen 4 reads bfloat16 at 1.05 of
// what a loop that only reads gets where memory is slow, and at 1.15 where it is fast; in GCC's order at 0.89 and 0.83.
template <class Format>
class InTurn {
 public:
  explicit InTurn(const uint8_t* p) : begin_(p) {}
  auto word(int, int i) {
    if (i == 0 || Format::line(i) != Format::line(i - 1)) line_ = words_in_turn(begin_ + Format::line(i));
    return Format::word(line_, i);
  }
  Words at(int, int64_t offset) const { return words_in_turn(begin_ + offset); }

 private:
  const uint8_t* const begin_;
  Words line_;
};

// The blocks of two strips, each word when it is wanted: an activation that was read is multiplied twice, and reading
// activations is what bounds many rows. If PREFETCHED, so are the blocks ALONE_AHEAD, line by line as words are read:
// were all twenty lines of int4 prefetched in a row, the next load would wait until memory has taken them.
template <class Format, bool PREFETCHED = false>
class Beside {
 public:
  Beside(const uint8_t* one, const uint8_t* other) : begin_{one, other} {}
  auto word(int s, int i) const {
    if constexpr (HELD) {
      const auto word = now(word_at<Format>(begin_[s], i));  // or GCC reads some words once for each row
      const int from = i * LINES / 16, to = (i + 1) * LINES / 16;
      if constexpr (PREFETCHED) prefetch_now(begin_[s] + ALONE_AHEAD + 64 * from, 64 * (to - from));
      return word;
    } else {
      return word_at<Format>(begin_[s], i);
    }
  }
  Words at(int s, int64_t offset) const { return now(words_at(begin_[s] + offset)); }

 private:
  static constexpr int LINES = Format::BYTES / 64;
  const uint8_t* const begin_[2];
};

// bfloat16 weights and activations; products of pairs, summed in float32.
struct Pairs {
  static constexpr int64_t INPUTS = 32, WORDS = 16, BYTES = 1024;  // of a block: input channels, words of a row, bytes
  static constexpr int64_t PREFETCH_ROWS = AHEAD_ROWS;             // rows from which the block AHEAD is prefetched
  using Sum = Floats;
  using Block = std::conditional_t<HELD, Loaded<Pairs>, InPlace<Pairs>>;   // for several rows
  using AtOnce = std::conditional_t<HELD, InTurn<Pairs>, InPlace<Pairs>>;  // for up to four

  static constexpr int64_t line(int i) { return 64 * i; }  // where word i comes from
  static Words word(Words line, int) { return line; }

  static void prepare(const uint16_t* x, int64_t R, int64_t K, int64_t blocks, Activations& a) {
    if (a.rows == 1 && K % INPUTS == 0) {
      a.words = reinterpret_cast<const int32_t*>(x);
      return;
    }
    int32_t* words = a.allocate(blocks * a.rows * WORDS);
    share_out(R, 16, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t left = K - b * INPUTS;
        for (int64_t r = begin; r < end; r++)
          put(words + (b * a.rows + r) * WORDS, shorts_at(x + r * K + b * INPUTS, left));
      }
    });
  }

  static Sum first(const Activations&, int64_t) { return all(0.0f); }

#ifdef AXON_PAIRS
  template <int ROWS, int STRIPS = 1>
  [[gnu::always_inline]] static inline void multiply(auto&& block, const Activations& a, int64_t at, Sum* sums) {
    constexpr bool ONCE = ROWS * STRIPS == 1;
    const int32_t* x = a.words + at * WORDS;
    Floats parts[STRIPS * ROWS][2];
#pragma GCC unroll 8
    for (auto& part : parts) part[0] = part[1] = all(0.0f);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      const Words one = block.word(0, i), other = STRIPS == 2 ? block.word(1, i) : one;
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const int32_t* pair = x + r * WORDS + i;
        parts[r][i % 2] = add_pairs<ONCE>(parts[r][i % 2], one, pair);
        if constexpr (STRIPS == 2) parts[ROWS + r][i % 2] = add_pairs<ONCE>(parts[ROWS + r][i % 2], other, pair);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < STRIPS * ROWS; r++) sums[r] = sums[r] + (parts[r][0] + parts[r][1]);
  }
#endif

  static Floats finish(Sum sum, const Activations&, int64_t, const float*) { return sum; }
};

// The same, multiplied in float32: for processors without the instruction, or where it is slow.
struct WidePairs : Pairs {
  static constexpr int64_t WORDS = 32;

  static void prepare(const uint16_t* x, int64_t R, int64_t K, int64_t blocks, Activations& a) {
    float* words = reinterpret_cast<float*>(a.allocate(blocks * a.rows * WORDS));
    share_out(R, 16, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < blocks; b++)
        for (int64_t r = begin; r < end; r++)
          for (int64_t k = 0; k < INPUTS; k += 16) {
            const int64_t from = b * INPUTS + k;
            put(words + (b * a.rows + r) * WORDS + k, load(x + r * K + from, K - from));
          }
    });
  }

  template <int ROWS, int STRIPS = 1>
  [[gnu::always_inline]] static inline void multiply(auto&& block, const Activations& a, int64_t at, Sum* sums) {
    constexpr int LAST = HELD ? 1 : 0;  // for every number of rows, or a row's sum would depend on it
    const float* x = reinterpret_cast<const float*>(a.words) + at * WORDS;
    Floats parts[STRIPS * ROWS][LAST + 1];
#pragma GCC unroll 8
    for (auto& part : parts) part[0] = all(0.0f), part[LAST] = all(0.0f);
#pragma GCC unroll WORDS_AT_ONCE
    for (int i = 0; i < 16; i++)
#pragma GCC unroll 2
      for (int s = 0; s < STRIPS; s++) {
        // Most are widened where they are wanted: of a block in registers GCC would widen all before the rows, for
        // which there are not enough.
        const Words both = HELD ? now(block.word(s, i)) : block.word(s, i);
        const Floats one = low_half(both), two = high_half(both);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          auto& part = parts[s * ROWS + r];
          part[0] = now(fma(one, all(x[r * WORDS + 2 * i]), part[0]));
          part[LAST] = now(fma(two, all(x[r * WORDS + 2 * i + 1]), part[LAST]));
        }
      }
#pragma GCC unroll 8
    for (int r = 0; r < STRIPS * ROWS; r++)
      sums[r] = sums[r] + (LAST == 0 ? parts[r][0] : parts[r][0] + parts[r][LAST]);
  }
};

// Sixteen rows of bfloat16 become a block: `count` of them, the others and what is past the `left`-th channel are
// zeros.
inline void lay_block(const uint16_t* rows, int64_t stride, int64_t count, int64_t left, uint8_t* block) {
  if (count >= 16 && left >= Pairs::INPUTS)
    lay_turned(block, 16, [&](int64_t i) { return words_at(rows + i * stride); });
  else
    lay_turned(block, 16, [&](int64_t i) { return shorts_at(rows + i * stride, i < count ? left : 0); });
}

// int8 weights; activations rounded with a scale for each row. Sums are exact.
struct Int8 {
  static constexpr int64_t INPUTS = 64, WORDS = 16 * FOUR, BYTES = 1024, PREFETCH_ROWS = AHEAD_ROWS;
  using Sum = Words;
  using Block = std::conditional_t<HELD, Loaded<Int8>, InPlace<Int8>>;
  using AtOnce = std::conditional_t<HELD, InTurn<Int8>, InPlace<Int8>>;

  static constexpr int64_t line(int i) { return 64 * i; }
  static Fours word(Words line, int) { return fours(line); }

  template <class X>
  static void prepare(const X* x, int64_t R, int64_t K, int64_t blocks, Activations& a) {
    int32_t* words = a.allocate(blocks * a.rows * WORDS);
    a.scale.resize(R), a.start.resize(R);
    share_out(R, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const X* row = x + r * K;
        Largest most;
        for (int64_t k = 0; k < K; k += 16) most.add(load(row + k, K - k));
        const float largest = most.value();
        const Floats inverse = all(127.0f / largest);
        Words total = all(0);
        for (int64_t k = 0; k < blocks * INPUTS; k += 16) {
          const Words bytes = nearest(load(row + k, K - k) * inverse);
          put_fours(words + (k / INPUTS * a.rows + r) * WORDS, k % INPUTS, bytes);
          total = total + bytes;
        }
        a.scale[r] = largest / 127.0f;
        a.start[r] = less(128, sum(total));  // the weights' bytes are 128 too large
      }
    });
  }

  static Sum first(const Activations& a, int64_t r) { return all(a.start[r]); }

  template <int ROWS, int STRIPS = 1>
  [[gnu::always_inline]] static inline void multiply(auto&& block, const Activations& a, int64_t at, Sum* sums) {
    constexpr bool ONCE = ROWS * STRIPS == 1;
    constexpr int LAST = TURNS<ROWS> - 1;
    const int32_t* x = a.words + at * WORDS;
    Words parts[STRIPS * ROWS][LAST + 1];
#pragma GCC unroll 8
    for (auto& part : parts) part[0] = all(0), part[LAST] = all(0);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      const int turn = i % 2 == 0 ? 0 : LAST;
      const Fours one = block.word(0, i), other = STRIPS == 2 ? block.word(1, i) : one;
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const int32_t* four = x + r * WORDS + i * FOUR;
        parts[r][turn] = add_fours<ONCE>(parts[r][turn], one, four);
        if constexpr (STRIPS == 2) parts[ROWS + r][turn] = add_fours<ONCE>(parts[ROWS + r][turn], other, four);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < STRIPS * ROWS; r++)
      sums[r] = sums[r] + (LAST == 0 ? parts[r][0] : parts[r][0] + parts[r][LAST]);
  }

  static Floats finish(Sum sum, const Activations& a, int64_t r, const float* scale) {
    return converted(sum) * all(a.scale[r]) * floats_at(scale);
  }
};

// int4 weights, w = (q − 8) · scale + middle; activations rounded with a scale for each row and group.
struct Int4 {
  static constexpr int64_t INPUTS = 2 * GROUP, WORDS = 16, BYTES = 640;  // two groups, 256 + 64 bytes each
  static constexpr int64_t PREFETCH_ROWS = INT4_AHEAD_ROWS;
  using Sum = Floats;

  using Block = Loaded<Int4>;
  using AtOnce = std::conditional_t<HELD, InTurn<Int4>, InPlace<Int4>>;

  // Half bytes, eight words to a group. What two words, or a group's two factors, have in common is read once: GCC
  // would read it for each, and Zen 4 takes a cycle to read 64 bytes.
  static constexpr int64_t line(int i) { return i / 8 * (BYTES / 2) + i % 8 / 2 * 64; }
  static Words word(Words line, int i) { return i % 2 == 0 ? low_halves(line) : high_halves(line); }

  template <class X>
  static void prepare(const X* x, int64_t R, int64_t K, int64_t blocks, Activations& a) {
    int32_t* words = a.allocate(blocks * a.rows * WORDS);
    const int64_t groups = 2 * blocks * a.rows;
    a.scale.resize(groups), a.sum.resize(groups), a.start.resize(groups);
    share_out(R, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        for (int64_t k = 0; k < blocks * INPUTS; k += GROUP) {
          const Floats one = load(x + r * K + k, K - k), two = load(x + r * K + k + 16, K - k - 16);
          Largest most;
          most.add(one), most.add(two);
          const float largest = most.value();
          const Floats inverse = all(127.0f / largest);
          const int64_t at = k / INPUTS * a.rows + r, group = 2 * at + k / GROUP % 2;
          int8_t* out = reinterpret_cast<int8_t*>(words + at * WORDS) + k % INPUTS;
          const Words first = nearest(one * inverse), second = nearest(two * inverse);
          put_bytes(out, first), put_bytes(out + 16, second);
          const int32_t total = sum(first + second);
          a.scale[group] = largest / 127.0f;
          a.sum[group] = a.scale[group] * static_cast<float>(total);
          a.start[group] = less(8, total);  // the weights' half bytes are 8 too large
        }
    });
  }

  static Sum first(const Activations&, int64_t) { return all(0.0f); }

  template <int ROWS, int STRIPS = 1>
  [[gnu::always_inline]] static inline void multiply(auto&& block, const Activations& a, int64_t at, Sum* sums) {
    const int32_t *x = a.words + at * WORDS, *start = a.start.data() + 2 * at;
    const float *scale = a.scale.data() + 2 * at, *sum = a.sum.data() + 2 * at;
    constexpr bool ONCE = ROWS * STRIPS == 1;
    constexpr int GROUPS = STRIPS == 2 || (HELD && ONCE) ? 1 : TURNS<ROWS>;  // taken together
#pragma GCC unroll 2
    for (int first = 0; first < 2; first += GROUPS) {
      Words products[STRIPS * ROWS][GROUPS];
#pragma GCC unroll 8
      for (int r = 0; r < STRIPS * ROWS; r++)
#pragma GCC unroll 2
        for (int g = 0; g < GROUPS; g++) products[r][g] = halves_from(start[2 * (r % ROWS) + first + g]);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
          for (int g = 0; g < GROUPS; g++) {
            const int word = 8 * (first + g) + i;
            const int32_t* four = x + r * WORDS + word;
            products[r][g] = add_halves<ONCE>(products[r][g], block.word(0, word), four);
            if constexpr (STRIPS == 2)
              products[ROWS + r][g] = add_halves<ONCE>(products[ROWS + r][g], block.word(1, word), four);
          }
#pragma GCC unroll 2
      for (int g = first; g < first + GROUPS; g++)
#pragma GCC unroll 2
        for (int s = 0; s < STRIPS; s++) {
          const Words factors = block.at(s, g * (BYTES / 2) + 256);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; r++) {
            Sum& here = sums[s * ROWS + r];
            const int one = 2 * r + g;
            const Floats scaled =
                converted(gathered(products[s * ROWS + r][g - first], start[one])) * low_half(factors);
            here = fma(scaled, all(scale[one]), fma(high_half(factors), all(sum[one]), here));
          }
        }
    }
  }

  static Floats finish(Sum sum, const Activations&, int64_t, const float*) { return sum; }
};

}  // namespace
