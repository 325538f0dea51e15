// int8 weights on AVX-512 without VNNI, by products of pairs of int16.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "arch_int8_avx512.h"

namespace {

// A in the order of int8_avx2.cpp.
struct Pairs {
  static constexpr bool kUnsigned = false;
  static constexpr int kParts = 2;
  static __m512i half(__m512i bytes, int odd) {
    return _mm512_srai_epi16(odd ? bytes : _mm512_slli_epi16(bytes, 8), 8);
  }
  static void put(uint32_t* a, __m512i bytes) {
    for (int odd = 0; odd < 2; ++odd) _mm512_storeu_si512(a + 16 * odd, half(bytes, odd));
  }
  static __m512i add(__m512i sum, int odd, __m512i left, __m512i right) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(left, half(right, odd)));
  }
};

constexpr Kernels kFloat32 = make_int8_kernels<Int8<float, Pairs>>("avx512");
constexpr Kernels kBFloat16 = make_int8_kernels<Int8<uint16_t, Pairs>>("avx512");

}  // namespace

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx512_int8_kernels(DType rows) {
  return rows == DType::kFloat32 ? &::kFloat32 : &::kBFloat16;
}

#else

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx512_int8_kernels(DType) { return nullptr; }

#endif
