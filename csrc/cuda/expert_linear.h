// Products of grouped rows on a GPU: launchers of the kernels in expert_linear.cuh.
#pragma once

#include <cstdint>

struct CUstream_st;  // what cudaStream_t points to

namespace beit3_fast::cuda {

// y[r] = gelu(rstd (x[r] W_e^T - mean s_e) + c_e) + residual[r] for the rows r of expert e:
// LayerNorm folded into the weights, its mean and deviation from the moments of the rows. Pointers
// are to device memory, strides in elements.
struct ExpertLinear {
  enum class Element : int32_t { kBFloat16, kFloat16 };
  static constexpr int kMaxExperts = 3;
  // Columns of a part of `y_parts`; the last part of a row may have fewer.
  static constexpr int kPartWidth = 128;

  Element element = Element::kBFloat16;
  bool gelu = false;
  const void* x = nullptr;  // [num_rows, in_features]
  int64_t x_stride = 0;
  const void* weights = nullptr;  // [num_experts, out_features, in_features], contiguous
  const float* sums = nullptr;    // [num_experts, out_features]: s; read only where there are parts
  const float* biases = nullptr;  // [num_experts, out_features]: c; may be null
  // fp32 [num_rows, num_parts, 2]: mean and sum of squared deviations of every part_width columns
  // of a row of x. Null: no LayerNorm.
  const float* parts = nullptr;
  int64_t num_parts = 0;
  int64_t part_width = 0;
  float eps = 0.0f;
  const void* residual = nullptr;  // [num_rows, out_features]; may be null
  int64_t residual_stride = 0;
  // [bounds[num_experts]]: place p of the experts is row rows[p] of x, residual, z and y. Null: row
  // p.
  const int64_t* rows = nullptr;
  void* z = nullptr;  // [num_rows, out_features], strided as y: what GELU is taken of; may be null
  void* y = nullptr;  // [num_rows, out_features]
  int64_t y_stride = 0;
  // fp32 [num_rows, ceil(out_features / kPartWidth), 2]: moments of the rows of y as they are
  // stored; may be null.
  float* y_parts = nullptr;
  int64_t num_rows = 0;
  int64_t in_features = 0;
  int64_t out_features = 0;
  int64_t num_experts = 0;  // at most kMaxExperts
  int64_t bounds[kMaxExperts + 1] =
      {};  // host numbers: places of expert e are [bounds[e], bounds[e + 1])
  // Of the blocks of a cluster, where compute capability 9.0 has them: 1, 2 or 4.
  int64_t most_blocks = 4;
};

// Why the kernels do not take such operands, or null. Pointers are looked at, not followed.
const char* expert_linear_obstacle(const ExpertLinear& op);

// Enqueues the kernel on a stream of the current device, which must be of compute capability 9.0.
// What the obstacle does not speak of is trusted: rows and bounds in range. Returns why it could
// not be launched, or null.
const char* expert_linear(const ExpertLinear& op, CUstream_st* stream);

}  // namespace beit3_fast::cuda
