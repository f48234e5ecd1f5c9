// Intel's matrix unit (AMX), a loop for each instruction: the kernels for it are tested where a processor has none.
//
// Included before everything else, with AXON_TILES defined. What the instructions do is in Intel's Intrinsics Guide;
// they also take what is smaller than a normal number for zero, and sum in an order of their own. What they would
// refuse ends the process.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace matrix_unit {

struct Configuration {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
inline thread_local Configuration now{};
inline thread_local uint8_t tiles[8][16][64];

inline void load_configuration(const void* from) {
  std::memcpy(&now, from, sizeof(now));
  std::memset(tiles, 0, sizeof(tiles));
}
inline void store_configuration(void* to) { std::memcpy(to, &now, sizeof(now)); }
inline void release() { now = {}; }
inline void zero(int tile) { std::memset(tiles[tile], 0, sizeof(tiles[tile])); }

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int row = 0; row < now.rows[tile]; row++)
    std::memcpy(tiles[tile][row], static_cast<const uint8_t*>(from) + row * stride, now.bytes[tile]);
}
inline void store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < now.rows[tile]; row++)
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles[tile][row], now.bytes[tile]);
}

template <class T>
T at(int tile, int row, int column) {
  T value;
  std::memcpy(&value, tiles[tile][row] + column * sizeof(T), sizeof(T));
  return value;
}
inline float wide(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// sums += rows times columns, of which four bytes lie together: product(m, n, k) is that of one such four.
template <class Sum>
void multiply(int sums, int rows, int columns, const auto& product) {
  if (now.palette != 1 || now.rows[rows] != now.rows[sums] || now.bytes[columns] != now.bytes[sums] ||
      4 * now.rows[columns] != now.bytes[rows])
    std::abort();
  for (int m = 0; m < now.rows[sums]; m++)
    for (int n = 0; n < now.bytes[sums] / 4; n++) {
      Sum sum = at<Sum>(sums, m, n);
      for (int k = 0; k < now.rows[columns]; k++) sum += product(m, n, k);
      std::memcpy(tiles[sums][m] + 4 * n, &sum, 4);
    }
}
inline void pairs(int sums, int rows, int columns) {
  multiply<float>(sums, rows, columns, [&](int m, int n, int k) {
    float sum = 0;
    for (int i = 0; i < 2; i++)
      sum += wide(at<uint16_t>(rows, m, 2 * k + i)) * wide(at<uint16_t>(columns, k, 2 * n + i));
    return sum;
  });
}
inline void fours(int sums, int rows, int columns) {  // signed bytes times unsigned ones
  multiply<int32_t>(sums, rows, columns, [&](int m, int n, int k) {
    int32_t sum = 0;
    for (int i = 0; i < 4; i++) sum += at<int8_t>(rows, m, 4 * k + i) * at<uint8_t>(columns, k, 4 * n + i);
    return sum;
  });
}

}  // namespace matrix_unit

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig matrix_unit::load_configuration
#define _tile_storeconfig matrix_unit::store_configuration
#define _tile_release matrix_unit::release
#define _tile_zero matrix_unit::zero
#define _tile_loadd matrix_unit::load
#define _tile_stored matrix_unit::store
#define _tile_dpbf16ps matrix_unit::pairs
#define _tile_dpbsud matrix_unit::fours
#define syscall(...) 0L  // Linux allows it
