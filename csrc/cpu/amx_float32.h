// fp32 products by bf16 tiles. A number of 24 bits is the sum of three bf16, exactly:
//
//   x = top + middle + low,   |middle| <= 2^-8 |x|,  |low| <= 2^-16 |x|
//
// and a product the sum of six of theirs, added up in fp32; what is left out, middle times low and
// less, is below 2^-23 of it. An infinite number has no such parts and gives NaN; sums that are
// not finite are summed up again without parts (amx_linear_loops.h). Parts below 1e-38 count as 0.
#pragma once

#include "amx_tiles.h"
#include "arch_avx512.h"

namespace {

// Sixteen numbers, each part with nothing but zeros behind its upper half: the nearest bf16 to what
// the parts before leave of a number.
struct Parts {
  __m512i top, middle, low;
};

inline __m512i upper_half(Vec x) {
  const __m512i near = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_and_si512(near, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

inline Parts parts_of(Vec x) {
  Parts out;
  out.top = upper_half(x);
  const Vec rest = v_sub(x, _mm512_castsi512_ps(out.top));
  out.middle = upper_half(rest);
  const Vec last = v_sub(rest, _mm512_castsi512_ps(out.middle));
  out.low =
      _mm512_and_si512(_mm512_castps_si512(last), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return out;
}

// Rows k and k + 1 of a panel as pairs of bf16.
inline __m512i pair_up(__m512i even, __m512i odd) {
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}

template <class Dot>
struct SixProducts {
  static constexpr int kRowWords = 48;  // 16 of each part
  static constexpr int64_t kPartWords = kChunk * kPanel, kChunkWords = 3 * kPartWords;
  static constexpr int64_t kSteps = 6;

  // The small ones first.
  template <int M, int N>
  static void load(const uint32_t* a, const uint32_t* b, bool a_past, bool b_past) {
    load_operands<M, N>(a + kLow, kRowWords, b, a_past, b_past);
  }

  template <int M, int N, class LoadNext, class Beside>
  static void add(const uint32_t* a, const uint32_t* b, bool a_past, bool b_past,
                  const LoadNext& load_next, const Beside& beside) {
    const auto products = [&](const auto& load_more) {
      add_products<M, N, Dot>();
      load_more();
      beside();
    };
    products([&] { load_rows<M>(a + kMiddle, a_past); });
    products([&] { load_columns<N>(b + kPartWords, b_past); });
    products([&] { load_rows<M>(a, a_past); });
    products([&] { load_columns<N>(b + 2 * kPartWords, b_past); });
    products([&] { load_columns<N>(b, b_past); });
    products(load_next);
  }

 private:
  static constexpr int kMiddle = 16, kLow = 32;

  template <int M>
  static void load_rows(const uint32_t* a, bool past) {
    constexpr int64_t row = kRowWords * 4;
    load_a<false>(a, row, past);
    if (M == 2) load_a<true>(a + 16 * kRowWords, row, past);
  }
  template <int N>
  static void load_columns(const uint32_t* b, bool past) {
    load_b<false>(b, past);
    if (N == 2) load_b<true>(b + 16, past);
  }
};

struct RowsInParts {
  using T = float;
  static constexpr bool kInt8 = false;
  static constexpr int kPerUnit = 2;

  using Sums = LaneSums;

  static void put(uint32_t* a, const Vec* part) {
    const Parts first = parts_of(part[0]), second = parts_of(part[1]);
    store(a, first.top, second.top);
    store(a + 16, first.middle, second.middle);
    store(a + 32, first.low, second.low);
  }
  static void copy(uint32_t* a, const float* x, int64_t left) {
    const Vec part[] = {load_some(x, left), load_some(x + 16, left - 16)};
    put(a, part);
  }

 private:
  static void store(uint32_t* a, __m512i first, __m512i second) {
    const Vec low = _mm512_castsi512_ps(first), high = _mm512_castsi512_ps(second);
    _mm512_storeu_si512(a, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
};

// B lies in memory as fp32 and becomes three blocks of pairs, one behind the other, before it is
// multiplied.
template <class Dot>
struct Float32InParts : OfAmx<RowsInParts, SixProducts<Dot>> {
  static constexpr int kPerPackedUnit = 1;
  static constexpr bool kConverts = true;
  // Sums that wait in memory cost little beside six products, and weights are converted once a
  // block: rather high blocks of short slices. Two blocks of B, one of them being made, fill L1.
  static constexpr int64_t kMostRows = 512, kSliceBytes = int64_t{1200} << 10;
  static constexpr int64_t kWholeSlice = 12, kSlice = 12, kBlockOfB = 4, kUncut = 0;

  // Sixteen columns of two units of a panel; null: zeros.
  static void convert(const uint32_t* units, uint32_t* b) {
    constexpr int64_t kPartWords = SixProducts<Dot>::kPartWords;
    const Parts even = units == nullptr ? Parts{} : parts_of(_mm512_loadu_ps(units));
    const Parts odd = units == nullptr ? Parts{} : parts_of(_mm512_loadu_ps(units + kPanel));
    _mm512_storeu_si512(b, pair_up(even.top, odd.top));
    _mm512_storeu_si512(b + kPartWords, pair_up(even.middle, odd.middle));
    _mm512_storeu_si512(b + 2 * kPartWords, pair_up(even.low, odd.low));
  }
};

}  // namespace
