// What four neighbouring threads of a warp do together: they hold the columns of a row between them
// as the tensor cores leave it.
#pragma once

#include "portable.cuh"

namespace beit3_fast::cuda {

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}

__device__ __forceinline__ float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// Word j of thread t changes places with word t of thread j.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&words)[4]) {
  const int t = lane_index() % 4;
#pragma unroll
  for (int distance = 2; distance > 0; distance /= 2) {
    const bool upper = (t & distance) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = distance == 2 ? i : 2 * i;
      const int high = low + distance;
      const uint32_t received = shuffle_xor(upper ? words[low] : words[high], distance);
      words[low] = upper ? received : words[low];
      words[high] = upper ? words[high] : received;
    }
  }
}

}  // namespace beit3_fast::cuda
