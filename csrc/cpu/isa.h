// The instruction-set level of this process.
#pragma once

#include "kernels.h"

namespace beit3_fast::cpu {

enum class Isa : int32_t { kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmxBf16 };

// The best level of this CPU that was compiled in and is not above the one that BEIT3_FAST_CPU_ISA
// names (as isa_name does, in any case). Chosen once; throws std::runtime_error for another value.
Isa isa();
const char* isa_name(Isa isa);

// The kernels for a dtype at the current level, or at the nearest level below that has them.
const Kernels& kernels(DType dtype);
// The same for int8 weights and rows of a dtype.
const Kernels& int8_kernels(DType rows);

}  // namespace beit3_fast::cpu
