// Checks operands of row_statistics and launches its kernel.

#include "row_statistics.cuh"

#include <algorithm>

#include "launch.h"

namespace beit3_fast::cuda {

const char* row_statistics(const RowStatistics& op, CUstream_st* stream) {
  if (const char* obstacle = row_statistics_obstacle(op)) return obstacle;
  if (op.num_rows == 0) return nullptr;
  const int64_t blocks = (op.num_rows + kStatisticsWarps - 1) / kStatisticsWarps;
  const auto kernel =
      op.element == RowStatistics::Element::kBFloat16 ? moments<BFloat16> : moments<Float16>;
  const auto few = static_cast<int>(std::min<int64_t>(blocks, 1 << 16));
  return enqueue(kernel, {few, 32 * kStatisticsWarps, 0}, stream, op);
}

}  // namespace beit3_fast::cuda
