// The Arch (tile_loops.h) of bf16 pair products in AVX-512 registers.
#pragma once

#include "vec_avx512.h"
//
#include "block_loops.h"

namespace {

inline Vec dot_pairs(Vec sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

inline __m512i narrow(const Vec* part) { return (__m512i)_mm512_cvtne2ps_pbh(part[1], part[0]); }

constexpr int kOnes = 0x3f803f80;  // a pair of bf16 ones

// Sums (row_statistics.h) of x and x^2. Their difference keeps enough digits for bf16 operands
// unless the mean is far above the deviation or squares overflow. Both halved and in one vector:
// what waits between panels takes L1 from the products.
struct PairSums {
  static constexpr int64_t kWords = 16;
  Vec both;  // eight lanes of x, eight of x^2

  void load(const float* words) { both = v_load(words); }
  void store(float* words) const { v_store(words, both); }

  void add(const uint16_t* x, int64_t column, int64_t left) {
    add_pairs(v_units(x, 0, left), column);
  }

  void put(uint16_t* x, const Vec* y, int64_t column) {
    const __m512i pairs = narrow(y);
    _mm512_storeu_si512(x, pairs);
    add_pairs(pairs, column);
  }

  __attribute__((noinline)) static RowStatistics end(const PairSums& s, int64_t n) {
    const float total = static_cast<float>(n);
    const Vec upper = _mm512_shuffle_f32x4(s.both, s.both, 0xee);
    const float mean = v_sum(v_keep(s.both, 8, 0.0f)) / total;
    const float square = v_sum(v_keep(upper, 8, 0.0f)) / total;
    const float variance = square - mean * mean;
    const bool exact = square < __builtin_inff() && mean * mean <= 64.0f * variance;
    return {mean, 0.0f, exact ? variance : -1.0f};
  }

 private:
  void add_pairs(__m512i pairs, int64_t column) {
    const Vec even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const Vec odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper_half));
    const Vec sum = v_add(even, odd), square = v_fma(even, even, v_mul(odd, odd));
    const Vec next =
        v_add(_mm512_shuffle_f32x4(sum, square, 0x44), _mm512_shuffle_f32x4(sum, square, 0xee));
    both = column == 0 ? next : v_add(both, next);
  }
};

struct BFloat16 : OfTiles<BFloat16> {
  using T = uint16_t;
  static constexpr int kPerUnit = 2;
  static constexpr int kRowWords = 16;
  static constexpr int kTileRows = 12;
  // A block of B stays in the nearest cache: what is asked of memory meanwhile takes all ways to
  // the next one.
  static constexpr int64_t kDepthUnits = 256;
  static constexpr Asks kAsks = Asks::kByDepth;
  static constexpr int kExpDegree = 4;

  using Sums = PairSums;

  static void put(uint32_t* a, const Vec* part) { _mm512_storeu_si512(a, narrow(part)); }
  static void copy(uint32_t* a, const uint16_t* x, int64_t left) {
    _mm512_storeu_si512(a, v_units(x, 0, left));
  }
  static Vec put_sum(uint32_t* a, const Vec* part, Vec sum) {
    const __m512i pairs = narrow(part);
    _mm512_storeu_si512(a, pairs);
    return dot_pairs(sum, pairs, _mm512_set1_epi32(kOnes));
  }

  template <int M, int V>
  static void tile(const uint32_t* a, const uint32_t* b, int64_t panel_words, int64_t units,
                   float* c, int64_t c_stride, bool more, Ahead ahead) {
    Vec sum[M][V];
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < V; ++j) sum[i][j] = v_zero();
    }
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
      __m512i right[V];
      for (int j = 0; j < V; ++j) {
        right[j] = _mm512_loadu_si512(b + (j / 2) * panel_words + k * kPanel + (j % 2) * 16);
      }
      for (int i = 0; i < M; ++i) {
        const __m512i left = _mm512_set1_epi32(a[i * kRowWords + k]);
        for (int j = 0; j < V; ++j) sum[i][j] = dot_pairs(sum[i][j], left, right[j]);
      }
    };
    for (; units >= kChunk; units -= kChunk, a += M * kRowWords, b += kChunk * kPanel) {
      for (int64_t k = 0; k < kChunk; k += kAskUnits) {
        ahead.ask();
#pragma GCC unroll 4
        for (int64_t i = 0; i < kAskUnits; ++i) step(k + i);
      }
    }
    for (int64_t k = 0; k < units; ++k) step(k);
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < V; ++j) {
        float* const to = c + i * c_stride + 16 * j;
        v_store(to, more ? v_add(v_load(to), sum[i][j]) : sum[i][j]);
      }
    }
  }
};

}  // namespace
