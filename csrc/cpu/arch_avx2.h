// What the Archs (tile_loops.h) of AVX2 have in common.
#pragma once

#include "vec_avx2.h"
//
#include "block_loops.h"

namespace {

// Tiles made of parts that fit the registers: Arch::part<M, V> takes the place of tile, and asks
// once a chunk.
template <class Arch>
struct OfParts : OfTiles<Arch> {
  static constexpr Asks kAsks = Asks::kByParts;

  // One or two rows read several panels side by side. For more, what comes next is asked for, which
  // takes one panel after the other and is faster from three rows on.
  static int64_t vectors_at_once(int64_t rows, int64_t columns) {
    return rows <= 2 || columns <= 16 ? vectors_of_tiles(rows, columns) : 2;
  }

  // Sixteen registers hold the sums of six rows and sixteen columns, or of fewer rows and more
  // columns.
  template <int M, int V>
  static void tile(const uint32_t* a, const uint32_t* b, int64_t panel_words, int64_t units,
                   float* c, int64_t c_stride, bool more, Ahead ahead) {
    constexpr int kWide = M == 1 ? 4 : M <= 3 ? 2 : 1;
    constexpr int kVectors = V < kWide ? V : kWide;
    constexpr int kRows = M > 6 ? (M + 1) / 2 : M;
    constexpr int64_t kParts = V / kVectors * (M > kRows ? 2 : 1);
    ahead.lines = ceil_div(ahead.lines, max_of(1, units / kChunk) * kParts);
    for (int j = 0; j < V; j += kVectors) {
      const uint32_t* const right = b + (j / 2) * panel_words + (j % 2) * 16;
      float* const to = c + 16 * j;
      Arch::template part<kRows, kVectors>(a, M * Arch::kRowWords, right, panel_words, units, to,
                                           c_stride, more, ahead);
      if constexpr (M > kRows) {
        Arch::template part<M - kRows, kVectors>(a + kRows * Arch::kRowWords, M * Arch::kRowWords,
                                                 right, panel_words, units, to + kRows * c_stride,
                                                 c_stride, more, ahead);
      }
    }
  }
};

}  // namespace
