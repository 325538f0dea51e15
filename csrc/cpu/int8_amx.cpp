// int8 weights by AMX tile products.
#include "kernels.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "arch_int8_avx512.h"
//
#include "amx_linear_loops.h"

namespace {

struct Int8Tiles {
  template <int I>
  static void add() {  // the intrinsic takes nothing but digits
    if (I == 0) _tile_dpbssd(0, 4, 6);
    if (I == 1) _tile_dpbssd(1, 4, 7);
    if (I == 2) _tile_dpbssd(2, 5, 6);
    if (I == 3) _tile_dpbssd(3, 5, 7);
  }
};

// Only the form of A: its products are those of the tiles.
struct Bytes {
  static constexpr bool kUnsigned = false;
  static constexpr int kParts = 1;
  static void put(uint32_t* a, __m512i bytes) { _mm512_storeu_si512(a, bytes); }
};

constexpr Kernels kFloat32 =
    make_int8_kernels<OfAmx<Int8<float, Bytes>, OneProduct<Int8Tiles>>, AmxLinear>("amx_bf16");
constexpr Kernels kBFloat16 =
    make_int8_kernels<OfAmx<Int8<uint16_t, Bytes>, OneProduct<Int8Tiles>>, AmxLinear>("amx_bf16");

}  // namespace

const beit3_fast::cpu::Kernels* beit3_fast::cpu::amx_int8_kernels(DType rows) {
  return rows == DType::kFloat32 ? &::kFloat32 : &::kBFloat16;
}

#else

const beit3_fast::cpu::Kernels* beit3_fast::cpu::amx_int8_kernels(DType) { return nullptr; }

#endif
