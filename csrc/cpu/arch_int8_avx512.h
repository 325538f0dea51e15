// What the int8 Archs (tile_loops.h) of AVX-512 have in common; Dot says how a unit is multiplied.
#pragma once

#include "vec_avx512.h"
//
#include "block_loops.h"

namespace {

inline __m512i v_int8(const Vec* part) {
  const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(part[0]), _mm512_cvtps_epi32(part[1]));
  const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(part[2]), _mm512_cvtps_epi32(part[3]));
  // Packing keeps to lanes of 16 bytes: four bytes of each part in turn.
  alignas(64) static constexpr int32_t order[] = {0, 4, 8,  12, 1, 5, 9,  13,
                                                  2, 6, 10, 14, 3, 7, 11, 15};
  return _mm512_permutexvar_epi32(_mm512_loadu_si512(order), _mm512_packs_epi16(low, high));
}

// Dot has kUnsigned, kParts (words of A a unit takes), put(a, bytes), and add(sum, part, left,
// right).
template <class Element, class Dot>
struct Int8 : OfInt8<Element, OfTiles<Int8<Element, Dot>>> {
  static constexpr bool kUnsigned = Dot::kUnsigned;
  static constexpr int kRowWords = 16 * Dot::kParts;
  static constexpr int kTileRows = 6;
  static constexpr int64_t kDepthUnits = 768;

  static void put_int8(uint32_t* a, const Vec* part) { Dot::put(a, v_int8(part)); }

  template <int M, int V>
  static void tile(const uint32_t* a, const uint32_t* b, int64_t panel_words, int64_t units,
                   float* c, int64_t c_stride, bool more, Ahead) {
    // Loops that GCC unrolls only late leave the sums in memory at both ends.
    __m512i sum[M][V];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) {
        sum[i][j] = _mm512_setzero_si512();
      }
    }
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
      __m512i right[V];
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) {
        right[j] = _mm512_loadu_si512(b + (j / 2) * panel_words + k * kPanel + (j % 2) * 16);
      }
#pragma GCC unroll 16
      for (int part = 0; part < Dot::kParts; ++part) {
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          const auto word = static_cast<int>(a[i * kRowWords + 16 * part + k]);
          const __m512i left = _mm512_set1_epi32(word);
#pragma GCC unroll 16
          for (int j = 0; j < V; ++j) sum[i][j] = Dot::add(sum[i][j], part, left, right[j]);
        }
      }
    };
    for (; units >= kChunk; units -= kChunk, a += M * kRowWords, b += kChunk * kPanel) {
      // Sums go from one turn of a loop to the next through copies: where registers allow it, the
      // whole chunk is one turn.
      if constexpr (Dot::kParts == 1) {
#pragma GCC unroll 16
        for (int64_t k = 0; k < kChunk; ++k) step(k);
      } else {
#pragma GCC unroll 4
        for (int64_t k = 0; k < kChunk; ++k) step(k);
      }
    }
    for (int64_t k = 0; k < units; ++k) step(k);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) {
        float* const to = c + i * c_stride + 16 * j;
        const __m512i before = more ? _mm512_loadu_si512(to) : _mm512_setzero_si512();
        _mm512_storeu_si512(to, _mm512_add_epi32(before, sum[i][j]));
      }
    }
  }
};

}  // namespace
