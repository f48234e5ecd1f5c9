// Linear layers: rows of activations times all strips of a weight. strips.py has the layouts in PyTorch.

#include <torch/csrc/stable/library.h>

#include "tiles.h"

namespace {

// Rows from which int4 weights are widened to bfloat16 for the matrix unit; activations need no rounding then.
constexpr int64_t WIDENED_ROWS = 64;
// Rows up to which a weight as it lies in a checkpoint is multiplied where it lies; for more it is laid in strips.
constexpr int64_t STORED_ROWS = 8;
// What the matrix unit takes together, so that activations, weights and sums stay in the second-level cache.
constexpr int64_t TILE_ROWS = 512, TILE_BLOCKS = 8, TILE_STRIPS = 32;

inline int64_t pieces_of(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// How many of `count` parts of a weight a thread takes at a time: an eighth of its share (or what is said), or all of it
// if the weight is small: taking pieces costs a small product more than waiting for the other threads.
inline int64_t piece(int64_t count, int64_t bytes, int64_t of_a_share = 8) {
  constexpr int64_t SMALL = 4 << 20;
  return pieces_of(count, torch::stable::get_num_threads() * (bytes < SMALL ? 1 : of_a_share));
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

// From a bfloat16 weight [N, K] as it lies in a checkpoint: sixteen rows are laid in a strip.
struct Stored {
  static constexpr int64_t MADE = Pairs::BYTES;
  const uint16_t* weight;
  int64_t N, K;

  const uint8_t* blocks(int64_t strip, int64_t first, int64_t count, uint8_t* room) const {
    for (int64_t b = 0; b < count; b++) {
      const int64_t k = (first + b) * Pairs::INPUTS, left = K - k;
      const __mmask32 here = left >= 32 ? ~0u : (1u << left) - 1;
      __m512i rows[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; i++) {
        const int64_t n = strip * LANES + i;
        rows[i] = _mm512_maskz_loadu_epi16(n < N ? here : 0, weight + n * K + k);
      }
      turn(rows);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) _mm512_store_si512(room + b * MADE + 64 * i, rows[i]);
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
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000)), low = _mm512_set1_epi32(15);
    const __m512i factors = _mm512_loadu_si512(p + 256), half = _mm512_set1_epi32(0x8000);
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(factors, 16));
    const __m512 middle = _mm512_castsi512_ps(_mm512_and_si512(factors, upper));
    const __m512 start = _mm512_fnmadd_ps(_mm512_set1_ps(8.0f), scale, middle);
    for (int i = 0; i < 4; i++, to += 256) {
      const __m512i halves = _mm512_loadu_si512(p + 64 * i);
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; pair++) {  // bytes 0 and 1 low, 2 and 3 low, 0 and 1 high, 2 and 3 high
        const int shift = 16 * (pair % 2) + 4 * (pair / 2);
        const __m512i one = _mm512_and_si512(_mm512_srli_epi32(halves, shift), low);
        const __m512i two = _mm512_and_si512(_mm512_srli_epi32(halves, shift + 8), low);
        const __m512 first = _mm512_fmadd_ps(_mm512_cvtepi32_ps(one), scale, start);
        const __m512 second = _mm512_fmadd_ps(_mm512_cvtepi32_ps(two), scale, start);
        const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(first), half), 16);
        const __m512i odd = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(second), half), upper);
        _mm512_store_si512(to + 64 * pair, _mm512_or_si512(even, odd));
      }
    }
  }
};

template <class Weights>
Memory room_for(int64_t blocks) {
  return Weights::MADE == 0 ? Memory(nullptr, &std::free) : memory(blocks * Weights::MADE / 4);
}

inline __mmask16 lanes(int64_t left) { return left >= LANES ? 0xffff : (1u << left) - 1; }

// y [R, N] = x [R, K] times the weights of all strips; threads share the strips.
template <class Format, class Weights, class X>
void multiply(const X* x, const Weights& weights, const float* scales, X* y, int64_t R, int64_t K, int64_t N) {
  const int64_t blocks = pieces_of(K, Format::INPUTS), count = pieces_of(N, LANES);
  Activations a(R);
  Format::prepare(x, R, K, blocks, a);
  share(count, piece(count, count * blocks * Format::BYTES), [&](int64_t begin, int64_t end) {
    alignas(64) typename Format::Sum sums[TOGETHER];
    const Memory room = room_for<Weights>(blocks);
    for (int64_t strip = begin; strip < end; strip++) {
      const uint8_t* const all = weights.blocks(strip, 0, blocks, reinterpret_cast<uint8_t*>(room.get()));
      for (int64_t from = 0; from < R; from += TOGETHER) {
        const int64_t rows = std::min(TOGETHER, R - from);
        for (int64_t r = 0; r < rows; r++) sums[r] = Format::first(a, from + r);
        const uint8_t* p = all;
        if (rows == 1) {  // by itself: the sum and what is multiplied stay in registers
          typename Format::Sum sum = sums[0];
          for (int64_t b = 0; b < blocks; b++, p += Format::BYTES) {
            if constexpr (AHEAD_ROWS == 1) fetch(p + AHEAD, Format::BYTES);
            Format::template multiply<1>(typename Format::Block(p), a, b * R + from, &sum);
          }
          sums[0] = sum;
        } else
          for (int64_t b = 0; b < blocks; b++, p += Format::BYTES) {
            const typename Format::Block block(p);
            if (rows >= AHEAD_ROWS) fetch(p + AHEAD, Format::BYTES);
            const int64_t at = b * R + from;
            int64_t r = 0;
            for (; r + 4 <= rows; r += 4) Format::template multiply<4>(block, a, at + r, sums + r);
            for (; r < rows; r++) Format::template multiply<1>(block, a, at + r, sums + r);
          }
        const int64_t n = strip * LANES;
        const float* scale = scales == nullptr ? nullptr : scales + n;
        for (int64_t r = 0; r < rows; r++)
          store(y + (from + r) * N + n, Format::finish(sums[r], a, from + r, scale), lanes(N - n));
      }
    }
  });
}

#ifdef __AMX_TILE__

// The same by the matrix unit. Many rows are bound by what the second-level cache delivers, so two strips are taken
// together; few by what memory does, so one is.
template <class Format, class Weights, class X>
void multiply_in_tiles(const X* x, const Weights& weights, const float* scales, X* y, int64_t R, int64_t K, int64_t N) {
  const int64_t blocks = pieces_of(K, Format::INPUTS), count = pieces_of(N, LANES);
  Activations a(tile_rows(R));
  Format::prepare(x, R, K, blocks, a);
  const bool few = a.rows <= 2 * TILE;
  const int64_t rows = std::min(a.rows, TILE_ROWS), strips = few ? 1 : 2, chunk = few ? blocks : TILE_BLOCKS;
  share(count, piece(count, count * blocks * Format::BYTES, few ? 8 : 2), [&](int64_t begin, int64_t end) {
    const Tiles tiles(std::min(R, TILE));
    const Memory sums = memory(TILE_STRIPS * rows * LANES), room = room_for<Weights>(strips * chunk);
    for (int64_t strip = begin; strip < end; strip += TILE_STRIPS) {
      const int64_t together = std::min(TILE_STRIPS, end - strip);
      for (int64_t from = 0; from < a.rows; from += rows) {
        const int64_t here = std::min(rows, a.rows - from);
        for (int64_t b = 0; b < blocks; b += chunk)
          for (int64_t s = 0; s < together; s += strips) {
            const int64_t now = std::min(strips, together - s), taken = std::min(chunk, blocks - b);
            const uint8_t* w[2];
            for (int64_t i = 0; i < now; i++) {
              auto* to = reinterpret_cast<uint8_t*>(room.get()) + i * chunk * Weights::MADE;
              w[i] = weights.blocks(strip + s + i, b, taken, to);
            }
            tile_products<Format>(a.words + (b * a.rows + from) * Format::WORDS, a.rows * Format::WORDS * 4, here, w,
                                  now, taken, sums.get() + s * rows * LANES, rows * LANES, b > 0, few);
          }
        for (int64_t r = 0; r < std::min(here, R - from); r++)
          for (int64_t s = 0; s < together; s++) {
            const int64_t n = (strip + s) * LANES;
            const float* scale = scales == nullptr ? nullptr : scales + n;
            const __m512 result = Format::finish_tile(sums.get() + (s * rows + r) * LANES, a, from + r, scale);
            store(y + (from + r) * N + n, result, lanes(N - n));
          }
      }
    }
  });
}

#endif

// x […, K] and the result y […, N], of the same type: work(x, y, R, K).
template <class Work>
Tensor product(const Tensor& x, int64_t N, bool float32, const Work& work) {
  std::vector<int64_t> shape = sizes(x);
  const int64_t K = shape.back(), R = x.numel() / K;
  shape.back() = N;
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == BFLOAT16 || (float32 && type == torch::headeronly::ScalarType::Float),
                  "these weights take no activations of this type");
  const Tensor rows = in_order(x);
  Tensor y = blank(shape, x);
  const void* from = rows.const_data_ptr();
  void* to = y.mutable_data_ptr();
  if (type == BFLOAT16)
    work(static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), R, K);
  else
    work(static_cast<const float*>(from), static_cast<float*>(to), R, K);
  return y;
}

// The strips of a weight [N, K], whose size is looked at.
template <class Format>
Laid<Format> laid(const Tensor& strips, int64_t N, int64_t K) {
  const int64_t blocks = pieces_of(K, Format::INPUTS);
  STD_TORCH_CHECK(strips.numel() * 4 == pieces_of(N, LANES) * blocks * Format::BYTES, "strips of ", strips.numel(),
                  " words are no weights for ", K, " inputs and ", N, " outputs");
  return {static_cast<const uint8_t*>(strips.const_data_ptr()), blocks};
}

// bfloat16 weights, from wherever they are.
template <class Weights>
void multiply_bf16(const uint16_t* x, const Weights& weights, uint16_t* y, int64_t R, int64_t K, int64_t N,
                   int64_t products) {
#ifdef __AMX_TILE__
  if (products == TILES && tiles_allowed()) return multiply_in_tiles<TilePairs>(x, weights, nullptr, y, R, K, N);
#endif
#ifdef __AVX512BF16__
  if (products != WIDE) return multiply<Pairs>(x, weights, nullptr, y, R, K, N);
#endif
  multiply<WidePairs>(x, weights, nullptr, y, R, K, N);
}

Tensor bf16(const Tensor& x, const Tensor& strips, int64_t N, int64_t products) {
  return product(x, N, false, [&](const auto* in, auto* out, int64_t R, int64_t K) {
    if constexpr (sizeof(*in) == 2) multiply_bf16(in, laid<Pairs>(strips, N, K), out, R, K, N, products);
  });
}

Tensor int8(const Tensor& x, const Tensor& strips, const Tensor& scale, int64_t N, int64_t products) {
  const auto* scales = static_cast<const float*>(scale.const_data_ptr());
  return product(x, N, true, [&](const auto* in, auto* out, int64_t R, int64_t K) {
    const auto weights = laid<Int8>(strips, N, K);
#ifdef __AMX_TILE__
    if (products == TILES && tiles_allowed()) return multiply_in_tiles<TileInt8>(in, weights, scales, out, R, K, N);
#endif
    multiply<Int8>(in, weights, scales, out, R, K, N);
  });
}

Tensor int4(const Tensor& x, const Tensor& strips, int64_t N, int64_t products) {
  return product(x, N, true, [&](const auto* in, auto* out, int64_t R, int64_t K) {
    const auto weights = laid<Int4>(strips, N, K);
#ifdef __AMX_TILE__
    if (products == TILES && tiles_allowed() && R >= WIDENED_ROWS)
      return multiply_in_tiles<TilePairs>(in, Widened{weights.strips, weights.length}, nullptr, out, R, K, N);
#endif
    multiply<Int4>(in, weights, nullptr, out, R, K, N);
  });
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

// A weight [N, K] as it lies in a checkpoint: slower than strips, and nothing had to be laid out beforehand.
Tensor stored(const Tensor& x, const Tensor& weight, int64_t products) {
  STD_TORCH_CHECK(weight.scalar_type() == BFLOAT16 && weight.size(1) == x.size(x.dim() - 1) && weight.is_contiguous(),
                  "bfloat16 rows as long as those of the weight are wanted");
  const auto* w = static_cast<const uint16_t*>(weight.const_data_ptr());
  const int64_t N = weight.size(0);
  return product(x, N, false, [&](const auto* in, auto* out, int64_t R, int64_t K) {
    if constexpr (sizeof(*in) == 2) {
      if (R > STORED_ROWS) return multiply_bf16(in, Stored{w, N, K}, out, R, K, N, products);
      share(N, piece(N, 2 * N * K), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++)
          for (int64_t r = 0; r < R; r++)
            store(out + r * N + n, _mm512_set1_ps(dot(in + r * K, w + n * K, K, products == WIDE)), 1);
      });
    }
  });
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

extern "C" bool axon_tiles() { return tiles_allowed(); }

STABLE_TORCH_LIBRARY_IMPL(axon, CPU, m) {
  m.impl("bf16_stored", TORCH_BOX(&stored));
  m.impl("lay_strips", TORCH_BOX(&lay_strips));
  m.impl("strip_rows", TORCH_BOX(&strip_rows));
  m.impl("bf16_strips", TORCH_BOX(&bf16));
  m.impl("int8_strips", TORCH_BOX(&int8));
  m.impl("int4_strips", TORCH_BOX(&int4));
}
