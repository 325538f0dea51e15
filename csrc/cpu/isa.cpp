#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace beit3_fast::cpu {
namespace {

Isa detect() {
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  if (avx512_kernels(DType::kFloat32) != nullptr && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) {
    if (avx512bf16_kernels(DType::kBFloat16) != nullptr && __builtin_cpu_supports("avx512bf16")) {
      return Isa::kAvx512Bf16;
    }
    return Isa::kAvx512;
  }
#endif
  return Isa::kPortable;
}

Isa choose() {
  const Isa best = detect();
  const char* wish = std::getenv("BEIT3_FAST_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  for (Isa level : {Isa::kPortable, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (std::string(wish) == isa_name(level)) return level < best ? level : best;
  }
  throw std::runtime_error(
      std::string("BEIT3_FAST_CPU_ISA must be portable, avx512 or avx512_bf16, got '") + wish +
      "'");
}

}  // namespace

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    default:
      return "portable";
  }
}

Isa isa() {
  static const Isa level = choose();
  return level;
}

const Kernels& kernels(DType dtype) {
  const Kernels* found = nullptr;
  switch (isa()) {
    case Isa::kAvx512Bf16:
      found = avx512bf16_kernels(dtype);
      if (found != nullptr) break;
      [[fallthrough]];
    case Isa::kAvx512:
      found = avx512_kernels(dtype);
      if (found != nullptr) break;
      [[fallthrough]];
    case Isa::kPortable:
      found = portable_kernels(dtype);
  }
  return *found;
}

}  // namespace beit3_fast::cpu
