// AMX tile products of bf16, with AVX-512 BF16 for everything around them.
#include "kernels.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "arch_avx512bf16.h"
//
#include "amx_linear_loops.h"

namespace {

struct BFloat16Tiles {
  template <int I>
  static void add() {  // the intrinsic takes nothing but digits
    if (I == 0) _tile_dpbf16ps(0, 4, 6);
    if (I == 1) _tile_dpbf16ps(1, 4, 7);
    if (I == 2) _tile_dpbf16ps(2, 5, 6);
    if (I == 3) _tile_dpbf16ps(3, 5, 7);
  }
};

constexpr Kernels kBFloat16 = make_kernels<OfAmx<BFloat16, BFloat16Tiles>, AmxLinear>("amx_bf16");

}  // namespace

const beit3_fast::cpu::Kernels* beit3_fast::cpu::amx_kernels(DType dtype) {
  return dtype == DType::kBFloat16 ? &::kBFloat16 : nullptr;
}

#else

const beit3_fast::cpu::Kernels* beit3_fast::cpu::amx_kernels(DType) { return nullptr; }

#endif
