// Single numbers of fp32 and bf16 arrays, for what is not worth a vector.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace beit3_fast::cpu {

// A vector of fp32 or bf16 parameters; null data: absent.
struct Parameter {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBFloat16 ? 2 : 1;
}

inline const void* elements_on(const void* data, int64_t count, DType dtype) {
  return static_cast<const char*>(data) + count * bytes_of(dtype);
}

inline float load_element(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint32_t wide = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// bf16 is rounded to nearest even; not a number stays one.
inline void store_element(DType dtype, void* data, int64_t i, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = value == value ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits >> 16);
}

// The first `count` numbers in fp32, then zeros up to `padded`.
inline void to_float(const Parameter& from, int64_t count, int64_t padded, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = load_element(from.dtype, from.data, i);
  for (int64_t i = count; i < padded; ++i) to[i] = 0.0f;
}

}  // namespace beit3_fast::cpu
