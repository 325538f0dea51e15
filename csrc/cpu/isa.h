// The instruction-set level of this process.
#pragma once

#include "kernels.h"

namespace beit3_fast::cpu {

enum class Isa : int32_t { kPortable = 0, kAvx512 = 1, kAvx512Bf16 = 2 };

// The best level of this CPU that was compiled in, lowered by BEIT3_FAST_CPU_ISA
// (portable | avx512 | avx512_bf16), which is read once. Throws std::runtime_error for another
// value.
Isa isa();
const char* isa_name(Isa isa);

// The kernels for a dtype at the current level, or at the nearest level below that has them.
const Kernels& kernels(DType dtype);

}  // namespace beit3_fast::cpu
