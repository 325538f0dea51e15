// Sixteen fp32 lanes on AVX-512 and the functions of them that the block loops use.
//
// Everything has internal linkage: an inline function shared with a baseline translation unit could
// be merged with a copy that needs AVX-512.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics read an "undefined" vector on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstdint>

#include "gelu_table.h"

namespace {

using Vec = __m512;

inline Vec v_zero() { return _mm512_setzero_ps(); }
inline Vec v_set(float x) { return _mm512_set1_ps(x); }
inline Vec v_add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec v_sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec v_mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec v_fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec v_max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline float v_sum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float v_top(Vec a) { return _mm512_reduce_max_ps(a); }

// Lanes [0, n) set, n in [0, 16].
inline __mmask16 v_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
// Lanes from n on replaced by `fill`.
inline Vec v_keep(Vec a, int64_t n, float fill) {
  return _mm512_mask_blend_ps(v_lanes(n), _mm512_set1_ps(fill), a);
}

inline Vec v_load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec v_load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(v_lanes(n), p); }
inline void v_store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline void v_store_n(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, v_lanes(n), a); }

inline Vec v_widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec v_load(const uint16_t* p) {
  return v_widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec v_load_n(const uint16_t* p, int64_t n) {
  return v_widen(_mm256_maskz_loadu_epi16(v_lanes(n), p));
}

// fp32 to bf16, to nearest even, NaN kept.
inline __m256i v_narrow(Vec a) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(a);
#else
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i out = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16));
#endif
}
inline void v_store(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v_narrow(a));
}
inline void v_store_n(uint16_t* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, v_lanes(n), v_narrow(a));
}

// Sixteen int32, less `offsets` where there are some.
inline Vec v_integers(const int32_t* p, const int32_t* offsets) {
  const __m512i whole = _mm512_loadu_si512(p);
  return _mm512_cvtepi32_ps(
      offsets == nullptr ? whole : _mm512_sub_epi32(whole, _mm512_loadu_si512(offsets)));
}

// 2^x for x <= 1: relative error 3e-6 (Degree 4), 2e-7 (5) or 1e-7 (6); below -150 it is 0.
template <int Degree>
inline Vec v_exp2(Vec x) {
  if (Degree == 4) {  // of what is above the next lower whole number, which scalef looks for itself
    const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Vec p = v_set(1.353417015e-02f);
    p = v_fma(p, f, v_set(5.201146717e-02f));
    p = v_fma(p, f, v_set(2.414427441e-01f));
    p = v_fma(p, f, v_set(6.930038398e-01f));
    p = v_fma(p, f, v_set(1.000002593e+00f));
    return _mm512_scalef_ps(p, x);
  }
  const Vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = _mm512_sub_ps(x, whole);
  Vec p;
  if (Degree == 5) {
    p = v_set(1.327645616e-03f);
    p = v_fma(p, f, v_set(9.675540961e-03f));
    p = v_fma(p, f, v_set(5.550713465e-02f));
    p = v_fma(p, f, v_set(2.402212024e-01f));
    p = v_fma(p, f, v_set(6.931469440e-01f));
  } else {
    p = v_set(1.534579787e-04f);
    p = v_fma(p, f, v_set(1.339993090e-03f));
    p = v_fma(p, f, v_set(9.618489072e-03f));
    p = v_fma(p, f, v_set(5.550328642e-02f));
    p = v_fma(p, f, v_set(2.402264625e-01f));
    p = v_fma(p, f, v_set(6.931471825e-01f));
  }
  p = v_fma(p, f, v_set(1.0f));
  return _mm512_scalef_ps(p, whole);  // 0 for x = -inf, where p is not a number: by definition
}

// Exact GELU: x Phi(x) = max(x, 0) - |x| Q(|x|), which keeps the relative precision of the negative
// tail, for results of element type T; absolute error 8e-8, for bf16 4e-6.
template <class T>
inline Vec v_gelu(Vec x) {
  const Vec a = _mm512_min_ps(_mm512_abs_ps(x), v_set(15.0f * kTailWidth));
  const Vec per_piece = v_set(1.0f / kTailWidth);
  // 1.5 * 2^23 leaves no room for a fraction: the last bits are the nearest whole number.
  const Vec whole = v_set(12582912.0f), shifted = v_fma(a, per_piece, whole);
  const __m512i i = _mm512_castps_si512(shifted);
  const Vec d = _mm512_fmsub_ps(a, per_piece, v_sub(shifted, whole));
  const auto coefficient = [&](int k) {
    return _mm512_permutexvar_ps(i, _mm512_load_ps(tail<T>(k)));
  };
  Vec q = coefficient(kTailDegree<T>);
  for (int k = kTailDegree<T> - 1; k >= 0; --k) q = v_fma(q, d, coefficient(k));
  return _mm512_fnmadd_ps(a, q, _mm512_max_ps(v_zero(), x));  // in this order a NaN stays
}

// rows[j] lane i becomes rows[i] lane j.
inline void v_transpose(__m512i rows[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Sixteen units (64 bytes) of a row from element `from` on; elements from `n` on read as zero.
inline __m512i v_units(const float* row, int64_t from, int64_t n) {
  const int64_t left = n - from;
  return left >= 16 ? _mm512_loadu_si512(row + from)
                    : _mm512_maskz_loadu_epi32(v_lanes(left > 0 ? left : 0), row + from);
}
inline __m512i v_units(const uint16_t* row, int64_t from, int64_t n) {
  const int64_t left = n - from;
  if (left >= 32) return _mm512_loadu_si512(row + from);
  const int64_t kept = left > 0 ? left : 0;
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << kept) - 1), row + from);
}

// One panel of B from rows that are its columns (see kernels.h).
template <class T>
inline void v_pack_panel(const T* const* rows, int64_t count, int64_t depth, uint32_t* panel) {
  constexpr int64_t per_unit = 4 / static_cast<int64_t>(sizeof(T));
  const int64_t step = 16 * per_unit;
  for (int64_t from = 0; from < depth; from += step, panel += 16 * 32) {
    for (int half = 0; half < 2; ++half) {
      __m512i tile[16];
      for (int j = 0; j < 16; ++j) {
        const int64_t column = 16 * half + j;
        tile[j] = column < count ? v_units(rows[column], from, depth) : _mm512_setzero_si512();
      }
      v_transpose(tile);
      for (int j = 0; j < 16; ++j) {
        _mm512_storeu_si512(panel + j * 32 + 16 * half, tile[j]);
      }
    }
  }
}

// One unit row (32 words) of a panel of B whose depth runs over rows: 32 columns from `from` on of
// row a (fp32), or of the pair of rows a, b (bf16). Columns from `n` on and null rows are zero.
inline void v_pack_rows(const float* a, const float*, int64_t from, int64_t n, uint32_t* words) {
  for (int half = 0; half < 2; ++half) {
    const __m512i row = a == nullptr ? _mm512_setzero_si512() : v_units(a, from + 16 * half, n);
    _mm512_storeu_si512(words + 16 * half, row);
  }
}
inline void v_pack_rows(const uint16_t* a, const uint16_t* b, int64_t from, int64_t n,
                        uint32_t* words) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i x = a == nullptr ? zero : v_units(a, from, n);
  const __m512i y = b == nullptr ? zero : v_units(b, from, n);
  // Bytes of 64-bit groups stay in order when unpacked, so widen by lanes first.
  const __m512i xlo = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x));
  const __m512i xhi = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1));
  const __m512i ylo = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(y));
  const __m512i yhi = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(y, 1));
  _mm512_storeu_si512(words, _mm512_or_si512(xlo, _mm512_slli_epi32(ylo, 16)));
  _mm512_storeu_si512(words + 16, _mm512_or_si512(xhi, _mm512_slli_epi32(yhi, 16)));
}

}  // namespace
