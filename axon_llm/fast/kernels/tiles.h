// The same products by the processor's matrix unit, where it has one (Intel AMX).
//
// The unit's registers are *tiles*: 16 rows of 64 bytes. A block of a strip is one, as it lies in memory, and so are 16
// rows of activations; one instruction multiplies them and adds the products to a tile of 16 × 16 sums. That is 1,024
// products of bytes per cycle where the vector unit has 128.
//
// Sums are taken block after block whatever rows are computed together, so here too a row's result does not depend on
// its neighbours.
//
// Legend: R rows, K input channels, N output channels
//
// Read next: weights.h.

#pragma once

#include "rows.h"

#ifdef AXON_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t TILE = 16;          // rows of a tile
constexpr int64_t TILE_AHEAD = 1024;  // as AHEAD: bytes

// Whether this process may use tiles: Linux wants to be asked.
inline bool tiles_allowed() {
#ifdef AXON_TILES
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return allowed;
#else
  return false;
#endif
}

inline int64_t round_up(int64_t size, int64_t multiple) { return pieces_of(size, multiple) * multiple; }

#ifdef AXON_TILES

// The compiler does not know that loading a tile reads memory: what it stores has to be there.
inline void written() { asm volatile("" ::: "memory"); }

// This thread's tiles, while the object lives: 0–3 hold sums and 4–5 rows of activations, `rows` of them; 6–7 hold
// weights. Then they are again what they were: PyTorch's kernels use them too.
class Tiles {
 public:
  explicit Tiles(int64_t rows) {
    _tile_storeconfig(&before_);
    Shape shape{.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = i < 6 ? static_cast<uint8_t>(rows) : TILE;
    written();
    _tile_loadconfig(&shape);
  }
  ~Tiles() {
    written();
    if (before_.palette == 0)
      _tile_release();
    else
      _tile_loadconfig(&before_);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Shape {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Shape) == 64);
  Shape before_;
};

// Rows in memory of R rows: whole tiles, or less than one.
inline int64_t tile_rows(int64_t R) { return R <= TILE ? R : round_up(R, TILE); }

// bfloat16 weights and activations; what is smaller than a normal number counts as zero.
struct TilePairs : Pairs {
  using Pairs::prepare;
  static void prepare(const float* x, int64_t R, int64_t K, int64_t blocks, Activations& a) {
    auto* words = reinterpret_cast<uint16_t*>(a.allocate(blocks * a.rows * WORDS));
    share_out(R, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        for (int64_t k = 0; k < blocks * INPUTS; k += 16)
          store(words + (k / INPUTS * a.rows + r) * INPUTS + k % INPUTS, load(x + r * K + k, K - k), LANES);
    });
  }

  // Sums 0–3 += rows 4 and 5 times strips 6 and 7.
  template <int ROWS, int STRIPS>
  static inline void multiply_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (ROWS == 2) _tile_dpbf16ps(1, 5, 6);
    if constexpr (STRIPS == 2) _tile_dpbf16ps(2, 4, 7);
    if constexpr (ROWS == 2 && STRIPS == 2) _tile_dpbf16ps(3, 5, 7);
  }

  static Floats finish_tile(const int32_t* sums, const Activations&, int64_t, const float*) { return floats_at(sums); }
};

// int8 weights; activations rounded with a scale for each row. Sums are exact, and the same as those of Int8.
struct TileInt8 : Int8 {
  template <int ROWS, int STRIPS>
  static inline void multiply_tiles() {
    _tile_dpbsud(0, 4, 6);
    if constexpr (ROWS == 2) _tile_dpbsud(1, 5, 6);
    if constexpr (STRIPS == 2) _tile_dpbsud(2, 4, 7);
    if constexpr (ROWS == 2 && STRIPS == 2) _tile_dpbsud(3, 5, 7);
  }

  static Floats finish_tile(const int32_t* sums, const Activations& a, int64_t r, const float* scale) {
    return finish(words_at(sums) + first(a, r), a, r, scale);
  }
};

// Blocks of one strip or of two: `line` bytes from one of a block's sixteen rows to the next, `step` from a block on.
struct Blocks {
  const uint8_t* from[2];
  int64_t line = 64, step = TILE * 64;
};

// One or two tiles of rows times one or two strips.
//
//   rows     of the first block; those of the next are `row_step` bytes on
//   sums     of the first strip, [ROWS * 16, 16] words, and `sum_step` words on of the second; begun with what is there
//            if there is anything
//   ahead    prefetch what comes next: worth it where strips come from memory
template <class Format, int ROWS, int STRIPS>
inline void tile_product(const int32_t* rows, int64_t row_step, const Blocks& strips, int64_t blocks, int32_t* sums,
                         int64_t sum_step, bool begun, bool ahead = false) {
  constexpr int64_t BYTES = 64, NEXT = TILE * LANES;  // of a tile: bytes of a row; words
  written();
  if (begun) {
    _tile_loadd(0, sums, BYTES);
    if constexpr (ROWS == 2) _tile_loadd(1, sums + NEXT, BYTES);
    if constexpr (STRIPS == 2) _tile_loadd(2, sums + sum_step, BYTES);
    if constexpr (ROWS == 2 && STRIPS == 2) _tile_loadd(3, sums + sum_step + NEXT, BYTES);
  } else {
    _tile_zero(0);
    if constexpr (ROWS == 2) _tile_zero(1);
    if constexpr (STRIPS == 2) _tile_zero(2);
    if constexpr (ROWS == 2 && STRIPS == 2) _tile_zero(3);
  }
  const auto *x = reinterpret_cast<const uint8_t*>(rows), *w = strips.from[0], *v = strips.from[STRIPS - 1];
  for (int64_t b = 0; b < blocks; b++, x += row_step, w += strips.step, v += strips.step) {
    asm volatile(".p2align 6");  // where the compiler puts it by itself, the same loop is up to 4 % slower
    _tile_loadd(4, x, BYTES);
    if constexpr (ROWS == 2) _tile_loadd(5, x + TILE * BYTES, BYTES);
    _tile_loadd(6, w, strips.line);
    if constexpr (STRIPS == 2) _tile_loadd(7, v, strips.line);
    if (ahead) prefetch(w + TILE_AHEAD, Format::BYTES);
    if constexpr (STRIPS == 2)
      if (ahead) prefetch(v + TILE_AHEAD, Format::BYTES);
    Format::template multiply_tiles<ROWS, STRIPS>();
  }
  _tile_stored(0, sums, BYTES);
  if constexpr (ROWS == 2) _tile_stored(1, sums + NEXT, BYTES);
  if constexpr (STRIPS == 2) _tile_stored(2, sums + sum_step, BYTES);
  if constexpr (ROWS == 2 && STRIPS == 2) _tile_stored(3, sums + sum_step + NEXT, BYTES);
}

// The same for `count` rows, a multiple of 16 or less than that, and one or two strips.
template <class Format>
inline void tile_products(const int32_t* rows, int64_t row_step, int64_t count, const Blocks& strips, int64_t how_many,
                          int64_t blocks, int32_t* sums, int64_t sum_step, bool begun, bool ahead = false) {
  int64_t r = 0;
  for (; r + 2 * TILE <= count; r += 2 * TILE) {
    const int32_t* x = rows + r * Format::WORDS;
    if (how_many == 2)
      tile_product<Format, 2, 2>(x, row_step, strips, blocks, sums + r * LANES, sum_step, begun, ahead);
    else
      tile_product<Format, 2, 1>(x, row_step, strips, blocks, sums + r * LANES, sum_step, begun, ahead);
  }
  if (r < count) {
    const int32_t* x = rows + r * Format::WORDS;
    if (how_many == 2)
      tile_product<Format, 1, 2>(x, row_step, strips, blocks, sums + r * LANES, sum_step, begun, ahead);
    else
      tile_product<Format, 1, 1>(x, row_step, strips, blocks, sums + r * LANES, sum_step, begun, ahead);
  }
}

#endif

}  // namespace
