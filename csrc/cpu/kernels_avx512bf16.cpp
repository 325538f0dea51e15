// AVX-512 with bf16 pair products.
#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)

#include "arch_avx512bf16.h"

namespace {

constexpr Kernels kBFloat16 = make_kernels<BFloat16>("avx512_bf16");

}  // namespace

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx512bf16_kernels(DType dtype) {
  return dtype == DType::kBFloat16 ? &::kBFloat16 : nullptr;
}

#else

const beit3_fast::cpu::Kernels* beit3_fast::cpu::avx512bf16_kernels(DType) { return nullptr; }

#endif
