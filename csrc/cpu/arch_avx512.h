// The Arch (tile_loops.h) of fp32 products in AVX-512 registers.
#pragma once

#include "vec_avx512.h"
//
#include "block_loops.h"

namespace {

struct Float32 : OfTiles<Float32> {
  using T = float;
  static constexpr int kPerUnit = 1;
  static constexpr int kRowWords = 16;
  static constexpr int kTileRows = 6;
  static constexpr int64_t kDepthUnits = 768;
  static constexpr int kExpDegree = 6;
  static constexpr int64_t kBlock = 64;  // units of depth in one chain of additions

  using Sums = LaneSums;

  static void put(uint32_t* a, const Vec* part) { _mm512_storeu_ps(a, part[0]); }
  static void copy(uint32_t* a, const float* x, int64_t left) {
    _mm512_storeu_si512(a, v_units(x, 0, left));
  }
  static Vec put_sum(uint32_t* a, const Vec* part, Vec sum) {
    put(a, part);
    return v_add(sum, part[0]);
  }

  template <int M, int V>
  static void tile(const uint32_t* a, const uint32_t* b, int64_t panel_words, int64_t units,
                   float* c, int64_t c_stride, bool more, Ahead) {
    // Sums of blocks of the depth are added up in c: one long chain of additions would round more
    // than the products of other libraries do. The first block is short for short products, which
    // others add up in lanes.
    int64_t longest = kBlock / 2;
    do {
      Vec sum[M][V];
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < V; ++j) sum[i][j] = v_zero();
      }
      const auto step = [&](int64_t k) __attribute__((always_inline)) {
        Vec right[V];
        for (int j = 0; j < V; ++j) {
          right[j] = _mm512_loadu_ps(b + (j / 2) * panel_words + k * kPanel + (j % 2) * 16);
        }
        for (int i = 0; i < M; ++i) {
          const Vec left = _mm512_castsi512_ps(_mm512_set1_epi32(a[i * kRowWords + k]));
          for (int j = 0; j < V; ++j) sum[i][j] = v_fma(left, right[j], sum[i][j]);
        }
      };
      int64_t block = min_of(units, longest);
      longest = kBlock;
      units -= block;
      for (; block >= kChunk; block -= kChunk, a += M * kRowWords, b += kChunk * kPanel) {
#pragma GCC unroll 4
        for (int64_t k = 0; k < kChunk; ++k) step(k);
      }
      for (int64_t k = 0; k < block; ++k) step(k);
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < V; ++j) {
          float* const to = c + i * c_stride + 16 * j;
          v_store(to, more ? v_add(v_load(to), sum[i][j]) : sum[i][j]);
        }
      }
      more = true;
    } while (units > 0);
  }
};

}  // namespace
