// int8 weights on AVX2, by products of pairs of int16.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)

#include "arch_avx2.h"

namespace {

// A holds int16: of each chunk the even numbers of all units, a pair in a word, then the odd ones.
// B is split in the same way as it is loaded.
template <class Element>
struct Int8 : OfInt8<Element, OfParts<Int8<Element>>> {
  static constexpr int kRowWords = 32;
  static constexpr int64_t kDepthUnits = 256;

  static __m256i evens(__m256i bytes) { return odds(_mm256_slli_epi16(bytes, 8)); }
  static __m256i odds(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

  static void put_int8(uint32_t* a, const Vec* part) {
    for (int half = 0; half < 2; ++half) {
      __m256i eights[4];
      for (int i = 0; i < 4; ++i)
        eights[i] = _mm256_cvtps_epi32(part[2 * half + i / 2].half[i % 2]);
      // Packing works within halves of registers: fours of every eight come in the order 0, 2, 4,
      // 6, 1, 3, 5, 7.
      const __m256i bytes =
          _mm256_permutevar8x32_epi32(_mm256_packs_epi16(_mm256_packs_epi32(eights[0], eights[1]),
                                                         _mm256_packs_epi32(eights[2], eights[3])),
                                      _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      v_store_words(a + 8 * half, evens(bytes));
      v_store_words(a + 16 + 8 * half, odds(bytes));
    }
  }

  template <int M, int V>
  static void part(const uint32_t* a, int64_t chunk_words, const uint32_t* b, int64_t panel_words,
                   int64_t units, float* c, int64_t c_stride, bool more, Ahead& ahead) {
    constexpr int W = 2 * V;
    __m256i sum[M][W];
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < W; ++j) {
        const auto* const from = reinterpret_cast<const __m256i*>(c + i * c_stride + 8 * j);
        sum[i][j] = more ? _mm256_loadu_si256(from) : _mm256_setzero_si256();
      }
    }
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
      for (int odd = 0; odd < 2; ++odd) {
        __m256i right[W];
        for (int j = 0; j < W; ++j) {
          const uint32_t* const words = b + (j / 4) * panel_words + k * kPanel + (j % 4) * 8;
          const __m256i unit = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
          right[j] = odd ? odds(unit) : evens(unit);
        }
        for (int i = 0; i < M; ++i) {
          const auto word = static_cast<int>(a[i * kRowWords + 16 * odd + k]);
          const __m256i left = _mm256_set1_epi32(word);
          for (int j = 0; j < W; ++j) {
            sum[i][j] = _mm256_add_epi32(sum[i][j], _mm256_madd_epi16(left, right[j]));
          }
        }
      }
    };
    for (; units >= kChunk; units -= kChunk, a += chunk_words, b += kChunk * kPanel) {
      ahead.ask();
#pragma GCC unroll 2
      for (int64_t k = 0; k < kChunk; ++k) step(k);
    }
    for (int64_t k = 0; k < units; ++k) step(k);
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < W; ++j) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + i * c_stride + 8 * j), sum[i][j]);
      }
    }
  }
};

constexpr Kernels kFloat32 = make_int8_kernels<Int8<float>>("avx2");
constexpr Kernels kBFloat16 = make_int8_kernels<Int8<uint16_t>>("avx2");

}  // namespace

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx2_int8_kernels(DType rows) {
  return rows == DType::kFloat32 ? &::kFloat32 : &::kBFloat16;
}

#else

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx2_int8_kernels(DType) { return nullptr; }

#endif
