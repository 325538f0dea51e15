// How a product in 8 bits is cut into tiles beyond linear_tiles.h, and which operands the kernels
// take. No code of a GPU's own.
#pragma once

#include "float8_linear.h"
#include "linear_tiles.h"

namespace beit3_fast::cuda {

// Steps of 128 numbers along K: as many bytes as a step of expert_linear has.
BEIT3_FAST_BOTH inline int float8_steps(const Float8Linear& op) {
  return tiles_of(static_cast<int>(op.in_features), Float8Linear::kBlock);
}

// Two 8-bit numbers are one 16-bit number to the tensor memory accelerator.
inline TiledTensor rows_of_float8_x(const Float8Linear& op, int bands) {
  return {op.x,
          2,
          {op.in_features / 2, op.num_rows},
          {op.in_features},
          {kTileDepth, bands * kBandRows}};
}

inline TiledTensor rows_of_float8_weights(const Float8Linear& op) {
  return {op.weights,
          3,
          {op.in_features / 2, op.out_features, op.num_experts},
          {op.in_features, op.in_features * op.out_features},
          {kTileDepth, kTileColumns, 1}};
}

inline const char* float8_obstacle(const Float8Linear& op) {
  if (const char* obstacle = linear_obstacle(op)) return obstacle;
  if (op.in_features % 16 != 0 || op.out_features % 16 != 0) {
    return "takes numbers of features that are multiples of 16";
  }
  if (op.element != ExpertLinear::Element::kBFloat16) return "takes bfloat16 beside 8 bits";
  if (op.rows != nullptr || op.z != nullptr) return "takes neither named rows nor z";
  if (op.x_scales == nullptr || op.weight_scales == nullptr) return "takes scales of x and weights";
  if (op.rounded != nullptr && op.rounded_scales == nullptr) {
    return "leaves numbers in 8 bits with their scales";
  }
  if (op.y == nullptr && op.rounded == nullptr) return "needs a place for its result";
  return in_16_bytes(op.rounded, 0) ? nullptr : "takes rows that begin at multiples of 16 bytes";
}

inline const char* rows_obstacle(const QuantizeRows& op) {
  if (op.features < 16 || op.features % 16 != 0) return "takes features in multiples of 16";
  return in_16_bytes(op.x, op.x_stride) && in_16_bytes(op.rounded, 0)
             ? nullptr
             : "takes rows that begin at multiples of 16 bytes";
}

}  // namespace beit3_fast::cuda
