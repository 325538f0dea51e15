// Operands of mma.sync that come straight from memory, where reading gives the pace.
//
// A product does not mind in which order columns are numbered if both operands agree, so a thread
// reads 16 bytes that lie together where the instruction's own order would have it read four times
// 4: of every 32 columns, thread 4 g + t has 8 t .. 8 t + 7 of row g. Words 0 and 1 are its operand
// of one product, words 2 and 3 that of the next.
#pragma once

#include "portable.cuh"

namespace beit3_fast::cuda {

__device__ __forceinline__ void load_or_clear(uint32_t (&words)[4], const uint16_t* from,
                                              bool real) {
  if (real) {
    load_16_bytes(words, from);
  } else {
    words[0] = words[1] = words[2] = words[3] = 0;
  }
}

}  // namespace beit3_fast::cuda
