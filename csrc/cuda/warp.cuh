// What the 32 threads of a warp find out together.
#pragma once

#include "portable.cuh"

namespace beit3_fast::cuda {

__device__ __forceinline__ float sum_of_warp(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ __forceinline__ float max_of_warp(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

}  // namespace beit3_fast::cuda
