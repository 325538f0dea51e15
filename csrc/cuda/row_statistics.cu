// Mean and sum of squared deviations of rows. A warp has a row; the second pass finds it in the L1
// cache, and subtracting the mean first loses nothing where the mean is many deviations away.

#include "row_statistics.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

namespace beit3_fast::cuda {
inline namespace statistics {

constexpr int kWarp = 32, kWarps = 4;

__device__ float sum_of_warp(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

template <class Element>
__global__ void __launch_bounds__(kWarp* kWarps) moments(RowStatistics op) {
  const auto* x = static_cast<const Element*>(op.x);
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; i < op.num_rows; i += step) {
    const int64_t row = op.rows != nullptr ? op.rows[i] : i;
    const Element* own = x + row * op.x_stride;
    float sum = 0.0f, squares = 0.0f;
    for (int64_t k = lane; k < op.features; k += kWarp) sum += static_cast<float>(own[k]);
    const float mean = sum_of_warp(sum) / static_cast<float>(op.features);
    for (int64_t k = lane; k < op.features; k += kWarp) {
      const float shift = static_cast<float>(own[k]) - mean;
      squares += shift * shift;
    }
    squares = sum_of_warp(squares);
    if (lane == 0) {
      op.parts[row * 2] = mean;
      op.parts[row * 2 + 1] = squares;
    }
  }
}

}  // namespace statistics

const char* row_statistics(const RowStatistics& op, CUstream_st* stream) {
  if (op.num_rows == 0) return nullptr;
  const int64_t blocks = std::min<int64_t>((op.num_rows + kWarps - 1) / kWarps, 1 << 16);
  const auto kernel =
      op.element == RowStatistics::Element::kBFloat16 ? moments<__nv_bfloat16> : moments<__half>;
  kernel<<<static_cast<unsigned>(blocks), kWarp * kWarps, 0, stream>>>(op);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace beit3_fast::cuda
