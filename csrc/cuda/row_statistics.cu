// Checks operands of row_statistics and launches its kernel.

#include "row_statistics.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace beit3_fast::cuda {

const char* row_statistics(const RowStatistics& op, CUstream_st* stream) {
  if (const char* obstacle = row_statistics_obstacle(op)) return obstacle;
  if (op.num_rows == 0) return nullptr;
  const int64_t blocks = (op.num_rows + kStatisticsWarps - 1) / kStatisticsWarps;
  const auto kernel =
      op.element == RowStatistics::Element::kBFloat16 ? moments<BFloat16> : moments<Float16>;
  kernel<<<static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 16)), 32 * kStatisticsWarps, 0,
           stream>>>(op);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace beit3_fast::cuda
