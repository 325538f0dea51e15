// Scales of 8-bit numbers: powers of two that take the largest of what shares one into [128, 256).
// beit3_fast/float8.py says why, and computes the same bits.
#pragma once

#include "portable.cuh"

namespace beit3_fast::cuda {

struct Float8Scale {
  float scale;
  float inverse;

  // `largest` is a magnitude. What is not finite makes NaN of all that share the scale.
  __device__ explicit Float8Scale(float largest) {
    constexpr int kLowest = 64, kNotFinite = 255, kOne = 127, kLargestLandsAt = 7;
    const int found = static_cast<int>(bits_of_float(largest) >> 23);
    const int exponent = max(found, kLowest) - kLargestLandsAt;
    scale =
        float_of_bits(found == kNotFinite ? 0x7fffffffu : static_cast<uint32_t>(exponent) << 23);
    inverse = float_of_bits(static_cast<uint32_t>(2 * kOne - exponent) << 23);
  }
};

// Four numbers in a word.
__device__ __forceinline__ uint32_t pack4_e4m3(float first, float second, float third,
                                               float fourth) {
  return pack2<E4M3>(first, second) | pack2<E4M3>(third, fourth) << 16;
}

}  // namespace beit3_fast::cuda
