// Products of grouped rows in 8 bits on a GPU: launchers of the kernels in float8_linear.cuh.
#pragma once

#include "expert_linear.h"

namespace beit3_fast::cuda {

// As ExpertLinear, with numbers of x and weights in e4m3 (contiguous rows, strides in bytes) and
// scales beside them; residual and y are bfloat16, sums fp32. Rows are not gathered, and there is
// no z.
struct Float8Linear : ExpertLinear {
  // Columns of a row that share a scale.
  static constexpr int kBlock = kPartWidth;

  const float* x_scales = nullptr;       // [num_rows, ceil(in_features / kBlock)]
  const float* weight_scales = nullptr;  // [num_experts, out_features]
  // y in 8 bits as the next product reads it: e4m3 [num_rows, out_features], contiguous, and its
  // scales [num_rows, ceil(out_features / kBlock)], or the scales alone. Null: not wanted. Without
  // `rounded`, y may not be null.
  void* rounded = nullptr;
  float* rounded_scales = nullptr;
};

// Rows as a product in 8 bits reads them.
struct QuantizeRows {
  const void* x = nullptr;  // bfloat16 [num_rows, features], the stride in elements
  int64_t x_stride = 0;
  void* rounded = nullptr;  // e4m3 [num_rows, features], contiguous
  float* scales = nullptr;  // [num_rows, ceil(features / Float8Linear::kBlock)]
  // Mean and sum of squared deviations [num_rows, ceil(features / kBlock), 2]; may be null.
  float* parts = nullptr;
  int64_t num_rows = 0;
  int64_t features = 0;
};

// Why the kernels do not take such operands, or null. Pointers are looked at, not followed.
const char* float8_linear_obstacle(const Float8Linear& op);
const char* quantize_rows_obstacle(const QuantizeRows& op);

// Enqueue a kernel on a stream of the current device, which must be of compute capability 8.9 or
// newer. Return why it could not be launched, or null.
const char* float8_linear(const Float8Linear& op, CUstream_st* stream);
const char* quantize_rows(const QuantizeRows& op, CUstream_st* stream);

}  // namespace beit3_fast::cuda
