// int8 weights by the products of AVX-512 VNNI, whose first operand is unsigned.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)

#include "arch_int8_avx512.h"

namespace {

struct Fours {
  static constexpr bool kUnsigned = true;
  static constexpr int kParts = 1;
  static void put(uint32_t* a, __m512i bytes) {
    const __m512i signs = _mm512_set1_epi32(static_cast<int>(0x80808080u));
    _mm512_storeu_si512(a, _mm512_xor_si512(bytes, signs));
  }
  static __m512i add(__m512i sum, int, __m512i left, __m512i right) {
#ifdef _mm512_dpbusd_epi32  // a macro in place of the instruction, as the tests have it
    return _mm512_dpbusd_epi32(sum, left, right);
#else
    // By the intrinsic GCC 12 copies every sum to another register and back around the loop.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
    return sum;
#endif
  }
};

constexpr Kernels kFloat32 = make_int8_kernels<Int8<float, Fours>>("avx512_vnni");
constexpr Kernels kBFloat16 = make_int8_kernels<Int8<uint16_t, Fours>>("avx512_vnni");

}  // namespace

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx512vnni_int8_kernels(DType rows) {
  return rows == DType::kFloat32 ? &::kFloat32 : &::kBFloat16;
}

#else

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx512vnni_int8_kernels(DType) { return nullptr; }

#endif
