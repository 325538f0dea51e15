// AVX2: fp32, and bf16 widened to fp32.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)

#include "arch_avx2.h"

namespace {

// A holds fp32; B holds fp32, or pairs of bf16 that are split as they are loaded.
template <class Element>
struct Avx2 : OfParts<Avx2<Element>> {
  using T = Element;
  static constexpr int kPerUnit = 4 / static_cast<int>(sizeof(Element));
  static constexpr int kRowWords = 16 * kPerUnit;
  static constexpr int kTileRows = 12;
  static constexpr int64_t kDepthUnits = 768 / kPerUnit;
  static constexpr int kExpDegree = kPerUnit == 1 ? 6 : 5;
  // Units of depth in one chain of additions, for the reason given at the fp32 tile of
  // kernels_avx512.cpp.
  static constexpr int64_t kBlock = kPerUnit == 1 ? 2 * kChunk : int64_t{1} << 40;

  using Sums = LaneSums;

  static void put(uint32_t* a, const Vec* part) { put_sum(a, part, v_zero()); }
  static void copy(uint32_t* a, const T* x, int64_t left) {
    for (int j = 0; j < kPerUnit; ++j) {
      v_store(reinterpret_cast<float*>(a + 16 * j), load_some(x + 16 * j, left - 16 * j));
    }
  }
  static Vec put_sum(uint32_t* a, const Vec* part, Vec sum) {
    for (int j = 0; j < kPerUnit; ++j) {
      const Vec rounded = v_as(static_cast<const T*>(nullptr), part[j]);
      v_store(reinterpret_cast<float*>(a + 16 * j), rounded);
      sum = v_add(sum, rounded);
    }
    return sum;
  }

  template <int M, int V>
  static void part(const uint32_t* a, int64_t chunk_words, const uint32_t* b, int64_t panel_words,
                   int64_t units, float* c, int64_t c_stride, bool more, Ahead& ahead) {
    // Eights of columns. Arrays of registers, not of Vec: those the compiler would keep in memory.
    constexpr int W = 2 * V;
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    do {
      __m256 sum[M][W];
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < W; ++j) sum[i][j] = _mm256_setzero_ps();
      }
      const auto step = [&](int64_t k) __attribute__((always_inline)) {
        for (int each = 0; each < kPerUnit; ++each) {
          __m256 right[W];
          for (int j = 0; j < W; ++j) {
            const uint32_t* const words = b + (j / 4) * panel_words + k * kPanel + (j % 4) * 8;
            const __m256i unit = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
            right[j] = _mm256_castsi256_ps(kPerUnit == 1 ? unit
                                           : each == 1   ? _mm256_and_si256(unit, high)
                                                         : _mm256_slli_epi32(unit, 16));
          }
          for (int i = 0; i < M; ++i) {
            const uint32_t* const word = a + i * kRowWords + kPerUnit * k + each;
            const __m256 left = _mm256_broadcast_ss(reinterpret_cast<const float*>(word));
            for (int j = 0; j < W; ++j) sum[i][j] = _mm256_fmadd_ps(left, right[j], sum[i][j]);
          }
        }
      };
      int64_t block = min_of(units, kBlock);
      units -= block;
      for (; block >= kChunk; block -= kChunk, a += chunk_words, b += kChunk * kPanel) {
        ahead.ask();
#pragma GCC unroll 2
        for (int64_t k = 0; k < kChunk; ++k) step(k);
      }
      for (int64_t k = 0; k < block; ++k) step(k);
      for (int i = 0; i < M; ++i) {
        for (int j = 0; j < W; ++j) {
          float* const to = c + i * c_stride + 8 * j;
          _mm256_storeu_ps(to, more ? _mm256_add_ps(_mm256_loadu_ps(to), sum[i][j]) : sum[i][j]);
        }
      }
      more = true;
    } while (units > 0);
  }
};

constexpr Kernels kFloat32 = make_kernels<Avx2<float>>("avx2");
constexpr Kernels kBFloat16 = make_kernels<Avx2<uint16_t>>("avx2");

}  // namespace

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx2_kernels(DType dtype) {
  return dtype == DType::kFloat32 ? &::kFloat32 : &::kBFloat16;
}

#else

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx2_kernels(DType) { return nullptr; }

#endif
