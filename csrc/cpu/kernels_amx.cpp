// AMX tile products of bf16 and of fp32 in parts, with AVX-512 BF16 for everything around them.
#include "kernels.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "arch_avx512bf16.h"
//
#include "amx_float32.h"
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

constexpr Kernels kBFloat16 =
    make_kernels<OfAmx<BFloat16, OneProduct<BFloat16Tiles>>, AmxLinear>("amx_bf16");

// Products of fp32 by tiles; attention and the rest as with AVX-512.
constexpr Kernels make_float32() {
  using Tiles = Float32InParts<BFloat16Tiles>;
  Kernels own = make_kernels<Float32>("amx_bf16");
  own.linear = AmxLinear::of<Tiles>();
  own.product_scratch = amx_linear_scratch<Tiles>;
  own.product_loop = converted_product_loop<Tiles>;
  return own;
}

constexpr Kernels kFloat32 = make_float32();

}  // namespace

const beit3_fast::cpu::Kernels* beit3_fast::cpu::amx_kernels(DType dtype) {
  return dtype == DType::kBFloat16 ? &::kBFloat16 : &::kFloat32;
}

#else

const beit3_fast::cpu::Kernels* beit3_fast::cpu::amx_kernels(DType) { return nullptr; }

#endif
