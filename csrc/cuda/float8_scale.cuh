// Scales of 8-bit numbers: powers of two that take the largest of what shares one into [128, 256).
// beit3_fast/float8.py says why, and computes the same bits.
#pragma once

#include "portable.cuh"

namespace beit3_fast::cuda {

struct Float8Scale {
  static constexpr int kLowest = 64, kNotFinite = 255, kOne = 127, kLargestLandsAt = 7;
  // As a number of 32 bits: what the smallest scale looks like, in whose order all of them are, NaN
  // last.
  static constexpr uint32_t kLowestBits = uint32_t{kLowest - kLargestLandsAt} << 23;

  float scale;
  float inverse;

  // `largest` is a magnitude. What is not finite makes NaN of all that share the scale.
  __device__ explicit Float8Scale(float largest) {
    const int found = static_cast<int>(bits_of_float(largest) >> 23);
    const int exponent = max(found, kLowest) - kLargestLandsAt;
    scale =
        float_of_bits(found == kNotFinite ? 0x7fffffffu : static_cast<uint32_t>(exponent) << 23);
    inverse = float_of_bits(static_cast<uint32_t>(2 * kOne - exponent) << 23);
  }

  // Of a scale, given by its bits; of one that is not finite any number.
  __device__ static float inverse_of(uint32_t scale) {
    return float_of_bits((uint32_t{2 * kOne} << 23) - scale);
  }
};

// Four numbers in a word.
__device__ __forceinline__ uint32_t pack4_e4m3(float first, float second, float third,
                                               float fourth) {
  return pack2<E4M3>(first, second) | pack2<E4M3>(third, fourth) << 16;
}

}  // namespace beit3_fast::cuda
