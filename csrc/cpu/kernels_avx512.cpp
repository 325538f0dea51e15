// AVX-512 without bf16 products: fp32, and bf16 widened to fp32.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "arch_avx512.h"

namespace {

// A holds the bf16 values as fp32, B pairs of bf16 that are split as they are loaded.
struct WidenedBFloat16 : OfTiles<WidenedBFloat16> {
  using T = uint16_t;
  static constexpr int kPerUnit = 2;
  static constexpr int kRowWords = 32;
  static constexpr int kTileRows = 12;
  static constexpr int64_t kDepthUnits = 768;
  static constexpr int kExpDegree = 5;

  using Sums = LaneSums;

  static void put(uint32_t* a, const Vec* part) { put_sum(a, part, v_zero()); }
  static void copy(uint32_t* a, const uint16_t* x, int64_t left) {
    for (int j = 0; j < 2; ++j) {
      _mm512_storeu_ps(a + 16 * j, load_some(x + 16 * j, left - 16 * j));
    }
  }
  static Vec put_sum(uint32_t* a, const Vec* part, Vec sum) {
    for (int j = 0; j < 2; ++j) {
      const Vec rounded = v_widen(v_narrow(part[j]));
      _mm512_storeu_ps(a + 16 * j, rounded);
      sum = v_add(sum, rounded);
    }
    return sum;
  }

  template <int M, int V>
  static void tile(const uint32_t* a, const uint32_t* b, int64_t panel_words, int64_t units,
                   float* c, int64_t c_stride, bool more, Ahead) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    Vec sum[M][V];
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < V; ++j) sum[i][j] = v_zero();
    }
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
      for (int odd = 0; odd < 2; ++odd) {
        Vec right[V];
        for (int j = 0; j < V; ++j) {
          const __m512i pairs =
              _mm512_loadu_si512(b + (j / 2) * panel_words + k * kPanel + (j % 2) * 16);
          right[j] = _mm512_castsi512_ps(odd ? _mm512_and_si512(pairs, high)
                                             : _mm512_slli_epi32(pairs, 16));
        }
        for (int i = 0; i < M; ++i) {
          const Vec left = _mm512_castsi512_ps(_mm512_set1_epi32(a[i * kRowWords + 2 * k + odd]));
          for (int j = 0; j < V; ++j) sum[i][j] = v_fma(left, right[j], sum[i][j]);
        }
      }
    };
    for (; units >= kChunk; units -= kChunk, a += M * kRowWords, b += kChunk * kPanel) {
#pragma GCC unroll 2
      for (int64_t k = 0; k < kChunk; ++k) step(k);
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

constexpr Kernels kFloat32 = make_kernels<Float32>("avx512");
constexpr Kernels kBFloat16 = make_kernels<WidenedBFloat16>("avx512");

}  // namespace

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx512_kernels(DType dtype) {
  return dtype == DType::kFloat32 ? &::kFloat32 : &::kBFloat16;
}

#else

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx512_kernels(DType) { return nullptr; }

#endif
