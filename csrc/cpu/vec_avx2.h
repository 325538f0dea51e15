// Sixteen fp32 lanes as two AVX2 registers: the same functions as vec_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "gelu_table.h"

namespace {

struct Vec {
  __m256 half[2];
};

template <class F>
inline Vec v_map(F f) {
  return {{f(0), f(1)}};
}

inline Vec v_set(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
inline Vec v_zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
inline Vec v_add(Vec a, Vec b) {
  return v_map([&](int i) { return _mm256_add_ps(a.half[i], b.half[i]); });
}
inline Vec v_sub(Vec a, Vec b) {
  return v_map([&](int i) { return _mm256_sub_ps(a.half[i], b.half[i]); });
}
inline Vec v_mul(Vec a, Vec b) {
  return v_map([&](int i) { return _mm256_mul_ps(a.half[i], b.half[i]); });
}
inline Vec v_fma(Vec a, Vec b, Vec c) {
  return v_map([&](int i) { return _mm256_fmadd_ps(a.half[i], b.half[i], c.half[i]); });
}
inline Vec v_max(Vec a, Vec b) {
  return v_map([&](int i) { return _mm256_max_ps(a.half[i], b.half[i]); });
}
inline float v_sum(Vec a) {
  const __m256 eight = _mm256_add_ps(a.half[0], a.half[1]);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float v_top(Vec a) {
  const __m256 eight = _mm256_max_ps(a.half[0], a.half[1]);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// All bits set in the lanes of half i that lie below n.
inline __m256i v_lanes(int64_t n, int i) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n) - 8 * i), lane);
}
// Lanes from n on replaced by `fill`.
inline Vec v_keep(Vec a, int64_t n, float fill) {
  return v_map([&](int i) {
    return _mm256_blendv_ps(_mm256_set1_ps(fill), a.half[i], _mm256_castsi256_ps(v_lanes(n, i)));
  });
}

inline Vec v_load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline Vec v_load_n(const float* p, int64_t n) {
  return v_map([&](int i) { return _mm256_maskload_ps(p + 8 * i, v_lanes(n, i)); });
}
inline void v_store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.half[0]);
  _mm256_storeu_ps(p + 8, a.half[1]);
}
inline void v_store_n(float* p, Vec a, int64_t n) {
  for (int i = 0; i < 2; ++i) _mm256_maskstore_ps(p + 8 * i, v_lanes(n, i), a.half[i]);
}

inline __m256 v_widen(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m128i v_eight(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline Vec v_load(const uint16_t* p) { return {{v_widen(v_eight(p)), v_widen(v_eight(p + 8))}}; }
inline Vec v_load_n(const uint16_t* p, int64_t n) {
  uint16_t some[16] = {};
  __builtin_memcpy(some, p, static_cast<unsigned long>(n) * sizeof(uint16_t));
  return v_load(some);
}

// fp32 rounded to bf16, to nearest even, NaN kept; the lower half of each lane is left over.
inline __m256i v_round(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(near, quiet, nan);
}
inline __m256i v_narrow(Vec a) {
  const __m256i low = _mm256_srli_epi32(v_round(a.half[0]), 16);
  const __m256i high = _mm256_srli_epi32(v_round(a.half[1]), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}
// The same value as if it had been stored as T and loaded again.
inline Vec v_as(const float*, Vec a) { return a; }
inline Vec v_as(const uint16_t*, Vec a) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return v_map(
      [&](int i) { return _mm256_castsi256_ps(_mm256_and_si256(v_round(a.half[i]), upper)); });
}
inline void v_store(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v_narrow(a));
}
inline void v_store_n(uint16_t* p, Vec a, int64_t n) {
  uint16_t some[16];
  v_store(some, a);
  __builtin_memcpy(p, some, static_cast<unsigned long>(n) * sizeof(uint16_t));
}

// Sixteen int32, less `offsets` where there are some.
inline Vec v_integers(const int32_t* p, const int32_t* offsets) {
  return v_map([&](int i) {
    __m256i whole = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i);
    if (offsets != nullptr) {
      whole = _mm256_sub_epi32(whole,
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offsets) + i));
    }
    return _mm256_cvtepi32_ps(whole);
  });
}

// 2^x for x <= 1: relative error 2e-7 (Degree 5) or 1e-7 (Degree 6); below -150 it is 0.
template <int Degree>
inline Vec v_exp2(Vec a) {
  return v_map([&](int i) {
    // In this order a NaN stays; -151 rounds to zero and keeps both powers of two finite.
    const __m256 x = _mm256_max_ps(_mm256_set1_ps(-151.0f), a.half[i]);
    const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(x, whole);
    const auto next = [&](__m256 p, float c) { return _mm256_fmadd_ps(p, f, _mm256_set1_ps(c)); };
    __m256 p;
    if (Degree == 5) {
      p = _mm256_set1_ps(1.327645616e-03f);
      p = next(p, 9.675540961e-03f);
      p = next(p, 5.550713465e-02f);
      p = next(p, 2.402212024e-01f);
      p = next(p, 6.931469440e-01f);
    } else {
      p = _mm256_set1_ps(1.534579787e-04f);
      p = next(p, 1.339993090e-03f);
      p = next(p, 9.618489072e-03f);
      p = next(p, 5.550328642e-02f);
      p = next(p, 2.402264625e-01f);
      p = next(p, 6.931471825e-01f);
    }
    p = next(p, 1.0f);
    const __m256i power = _mm256_cvtps_epi32(whole);
    const __m256i first = _mm256_srai_epi32(power, 1);
    const auto two_to = [](__m256i n) {
      const __m256i biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
      return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
    };
    p = _mm256_mul_ps(p, two_to(first));
    return _mm256_mul_ps(p, two_to(_mm256_sub_epi32(power, first)));
  });
}

// Exact GELU: x Phi(x) = max(x, 0) - |x| Q(|x|), as in vec_avx512.h.
template <class T>
inline Vec v_gelu(Vec x) {
  return v_map([&](int h) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.half[h]);
    const __m256 a = _mm256_min_ps(magnitude, _mm256_set1_ps(15.0f * kTailWidth));
    const __m256 per_piece = _mm256_set1_ps(1.0f / kTailWidth);
    const __m256 n =
        _mm256_round_ps(_mm256_mul_ps(a, per_piece), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i i = _mm256_cvtps_epi32(n);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // bit 3 as the sign
    const __m256 d = _mm256_fmsub_ps(a, per_piece, n);
    const auto coefficient = [&](int k) {
      const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(tail<T>(k)), i);
      const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(tail<T>(k) + 8), i);
      return _mm256_blendv_ps(low, high, upper);
    };
    __m256 q = coefficient(kTailDegree<T>);
    for (int k = kTailDegree<T> - 1; k >= 0; --k) q = _mm256_fmadd_ps(q, d, coefficient(k));
    // In this order a NaN stays.
    return _mm256_fnmadd_ps(a, q, _mm256_max_ps(_mm256_setzero_ps(), x.half[h]));
  });
}

// rows[j] lane i becomes rows[i] lane j.
inline void v_transpose(__m256i rows[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    rows[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) rows[i] = t[i];
}

// Eight units (32 bytes) of a row from element `from` on; elements from `n` on read as zero.
template <class T>
inline __m256i v_units(const T* row, int64_t from, int64_t n) {
  constexpr int64_t whole = 32 / static_cast<int64_t>(sizeof(T));
  const int64_t left = n - from;
  if (left >= whole) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + from));
  T some[whole] = {};
  if (left > 0) __builtin_memcpy(some, row + from, static_cast<unsigned long>(left) * sizeof(T));
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(some));
}
inline void v_store_words(uint32_t* p, __m256i words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}

// One panel of B from rows that are its columns (see kernels.h).
template <class T>
inline void v_pack_panel(const T* const* rows, int64_t count, int64_t depth, uint32_t* panel) {
  constexpr int64_t per_unit = 4 / static_cast<int64_t>(sizeof(T));
  const int64_t padded = (depth + 16 * per_unit - 1) / (16 * per_unit) * (16 * per_unit);
  for (int64_t from = 0; from < padded; from += 8 * per_unit, panel += 8 * 32) {
    for (int group = 0; group < 4; ++group) {
      __m256i tile[8];
      for (int j = 0; j < 8; ++j) {
        const int64_t column = 8 * group + j;
        tile[j] = column < count ? v_units(rows[column], from, depth) : _mm256_setzero_si256();
      }
      v_transpose(tile);
      for (int j = 0; j < 8; ++j) v_store_words(panel + j * 32 + 8 * group, tile[j]);
    }
  }
}

// One unit row (32 words) of a panel of B whose depth runs over rows: 32 columns from `from` on of
// row a (fp32), or of the pair of rows a, b (bf16). Columns from `n` on and null rows are zero.
inline void v_pack_rows(const float* a, const float*, int64_t from, int64_t n, uint32_t* words) {
  for (int group = 0; group < 4; ++group) {
    const __m256i row = a == nullptr ? _mm256_setzero_si256() : v_units(a, from + 8 * group, n);
    v_store_words(words + 8 * group, row);
  }
}
inline void v_pack_rows(const uint16_t* a, const uint16_t* b, int64_t from, int64_t n,
                        uint32_t* words) {
  const __m256i zero = _mm256_setzero_si256();
  for (int half = 0; half < 2; ++half) {
    const __m256i x = a == nullptr ? zero : v_units(a, from + 16 * half, n);
    const __m256i y = b == nullptr ? zero : v_units(b, from + 16 * half, n);
    const __m128i parts[2][2] = {{_mm256_castsi256_si128(x), _mm256_castsi256_si128(y)},
                                 {_mm256_extracti128_si256(x, 1), _mm256_extracti128_si256(y, 1)}};
    for (int i = 0; i < 2; ++i) {
      const __m256i low = _mm256_cvtepu16_epi32(parts[i][0]);
      const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(parts[i][1]), 16);
      v_store_words(words + 16 * half + 8 * i, _mm256_or_si256(low, high));
    }
  }
}

}  // namespace
