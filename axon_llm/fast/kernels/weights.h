// What a linear layer's weight is, and where blocks of it come from: strips, or rows as a checkpoint has them.
// strips.py has the layouts in PyTorch.
//
// Legend: N output channels, K input channels
//
// Read next: results.h.

#pragma once

#include "tiles.h"

namespace {

// Strips of a format, or bfloat16 as it lies in a checkpoint; strips.py and linear.py have the same numbers.
enum Kind : int64_t { BF16, INT8, INT4, STORED };

struct Weight {
  const Tensor* strips;  // one; or rows, as many as a checkpoint has for what is one product here
  size_t parts;
  const float* scales;  // int8: [N]
  Kind kind;
};

// N channels as an operator's arguments have them, which are looked at.
inline Weight weight_of(const Tensor* strips, size_t parts, const Tensor* scale, int64_t kind, int64_t N) {
  STD_TORCH_CHECK(kind >= BF16 && kind <= STORED, "there is no kind of weights ", kind);
  STD_TORCH_CHECK((kind == INT8) == (scale != nullptr), "scales are wanted for int8, and for nothing else");
  if (scale == nullptr) return {strips, parts, nullptr, static_cast<Kind>(kind)};
  STD_TORCH_CHECK(scale->scalar_type() == torch::headeronly::ScalarType::Float && scale->is_contiguous() &&
                      scale->numel() >= pieces_of(N, LANES) * LANES,
                  "float32 scales for whole strips of ", N, " channels are wanted");
  return {strips, parts, static_cast<const float*>(scale->const_data_ptr()), static_cast<Kind>(kind)};
}
// … of one tensor.
inline Weight weight_of(const Tensor& strips, const Tensor* scale, int64_t kind, int64_t N) {
  return weight_of(&strips, 1, scale, kind, N);
}

// Where blocks come from: `blocks` gives `count` blocks of a strip, from the `first` on. They are where they are, or
// made in `room`, which has MADE bytes for each.

// From strips.
template <class Format>
struct Laid {
  static constexpr int64_t MADE = 0;
  const uint8_t* strips;
  int64_t length;  // blocks of a strip

  const uint8_t* blocks(int64_t strip, int64_t first, int64_t, uint8_t*) const {
    return strips + (strip * length + first) * Format::BYTES;
  }
};

// From bfloat16 weights [N, K] as they lie in a checkpoint, as if one were below the other: sixteen rows are laid in a
// strip. All but the last have whole strips.
struct Stored {
  static constexpr int64_t MADE = Pairs::BYTES;
  struct Part {
    const uint16_t* weight;
    int64_t N;
  };
  std::vector<Part> parts;
  int64_t K;

  // A strip's rows, and how many of the sixteen there are.
  Part rows(int64_t strip) const {
    int64_t n = strip * LANES;
    size_t part = 0;
    while (n >= parts[part].N) n -= parts[part++].N;
    return {parts[part].weight + n * K, std::min(LANES, parts[part].N - n)};
  }
  const uint8_t* blocks(int64_t strip, int64_t first, int64_t count, uint8_t* room) const {
    const Part here = rows(strip);
    for (int64_t b = 0; b < count; b++) {
      const int64_t k = (first + b) * Pairs::INPUTS;
      lay_block(here.weight + k, K, here.N, K - k, room + b * MADE);
    }
    return room;
  }
};

// From int4 strips, widened to bfloat16.
struct Widened {
  static constexpr int64_t MADE = Pairs::BYTES;
  const uint8_t* strips;
  int64_t length;  // blocks of a strip, of int4

  const uint8_t* blocks(int64_t strip, int64_t first, int64_t count, uint8_t* room) const {
    const uint8_t* p = strips + (strip * length * 2 + first) * (Int4::BYTES / 2);
    for (int64_t g = 0; g < count; g++, p += Int4::BYTES / 2) widen(p, room + g * MADE);
    return room;
  }

 private:
  // A group: eight registers of four bytes for each channel become sixteen of two bfloat16.
  static void widen(const uint8_t* p, uint8_t* to) {
    const Words factors = words_at(p + 256), half = all(0x8000), low = all(15);
    const Floats scale = low_half(factors), start = fnma(all(8.0f), scale, high_half(factors));
    for (int i = 0; i < 4; i++, to += 256) {
      const Words halves = words_at(p + 64 * i);
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; pair++) {  // bytes 0 and 1 low, 2 and 3 low, 0 and 1 high, 2 and 3 high
        const int shift = 16 * (pair % 2) + 4 * (pair / 2);
        const Floats even = fma(converted((halves >> shift) & low), scale, start);
        const Floats odd = fma(converted((halves >> (shift + 8)) & low), scale, start);
        put(to + 64 * pair, ((as_words(even) + half) >> 16) | as_words(high_half(as_words(odd) + half)));
      }
    }
  }
};

// Two weights of as many channels, one below the other, whose strips come by turns.
template <class Weights>
struct ByTurns {
  static constexpr int64_t MADE = Weights::MADE;
  Weights both;
  int64_t half;  // strips of one

  int64_t which(int64_t strip) const { return strip % 2 * half + strip / 2; }
  auto rows(int64_t strip) const { return both.rows(which(strip)); }
  const uint8_t* blocks(int64_t strip, int64_t first, int64_t count, uint8_t* room) const {
    return both.blocks(which(strip), first, count, room);
  }
};

// The i-th of `count` strips from an even one on, in the order of memory: of strips that come by turns, whose count is
// even, first those of the one weight and then those of the other.
inline int64_t in_memory_order(const auto&, int64_t i, int64_t) { return i; }
template <class Weights>
int64_t in_memory_order(const ByTurns<Weights>&, int64_t i, int64_t count) {
  return i < count / 2 ? 2 * i : 2 * i + 1 - count;
}

// The first output channel of a strip.
inline int64_t channel(const auto&, int64_t strip) { return strip * LANES; }
template <class Weights>
int64_t channel(const ByTurns<Weights>& weights, int64_t strip) {
  return weights.which(strip) * LANES;
}

// The scales of its channels, where there are any.
inline const float* scales_of(const auto& weights, const float* scales, int64_t strip) {
  return scales == nullptr ? nullptr : scales + channel(weights, strip);
}

template <class Weights>
Memory room_for(int64_t blocks) {
  return Weights::MADE == 0 ? Memory(nullptr, &std::free) : memory(blocks * Weights::MADE / 4);
}

inline uint8_t* bytes(const Memory& room) { return reinterpret_cast<uint8_t*>(room.get()); }

// The strips of a weight [N, K], whose size is looked at.
template <class Format>
Laid<Format> laid(const Tensor& strips, int64_t N, int64_t K) {
  const int64_t blocks = pieces_of(K, Format::INPUTS);
  STD_TORCH_CHECK(
      strips.element_size() * strips.numel() == pieces_of(N, LANES) * blocks * Format::BYTES && strips.is_contiguous(),
      "strips of ", strips.numel(), " words are no weights for ", K, " inputs and ", N, " outputs");
  return {static_cast<const uint8_t*>(strips.const_data_ptr()), blocks};
}

// A checkpoint's weights of N channels, which are looked at.
inline Stored stored(const Weight& weight, int64_t N, int64_t K) {
  Stored found{{}, K};
  for (size_t i = 0; i < weight.parts; i++) {
    const Tensor& part = weight.strips[i];
    STD_TORCH_CHECK(part.scalar_type() == BFLOAT16 && part.dim() == 2 && part.size(1) == K && part.is_contiguous() &&
                        (i + 1 == weight.parts || part.size(0) % LANES == 0),
                    "bfloat16 rows as long as those of the activations are wanted, in whole strips but for the last");
    found.parts.push_back({static_cast<const uint16_t*>(part.const_data_ptr()), part.size(0)});
    N -= part.size(0);
  }
  STD_TORCH_CHECK(N == 0, "a row for each channel is wanted");
  return found;
}

// Weights in the order that their results are wanted in.
template <class Y, class Weights>
auto ordered(const Y& y, const Weights& weights) {
  if constexpr (Y::BY_TURNS)
    return ByTurns<Weights>{weights, y.N / LANES / 2};
  else
    return weights;
}

}  // namespace
