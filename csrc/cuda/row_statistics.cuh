// Mean and sum of squared deviations of rows. A warp has a row and reads it twice, the second time
// from the L1 cache: subtracting the mean first loses nothing where it is many deviations away.
#pragma once

#include "row_statistics.h"
#include "warp.cuh"

namespace beit3_fast::cuda {

constexpr int kStatisticsWarps = 4;

// The lane's numbers of a row, eight at a time.
template <class T, class Use>
__device__ void visit_row(const void* row, int64_t features, Use use) {
  const auto* words = static_cast<const uint32_t*>(row);
  for (int64_t column = lane_index() * 8; column < features; column += 32 * 8) {
    uint32_t eight[4];
    load_16_bytes(eight, words + column / 2);
    for (const uint32_t word : eight) {
      use(low_of<T>(word));
      use(high_of<T>(word));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kStatisticsWarps)
    moments(const __grid_constant__ RowStatistics op) {
  const auto* x = static_cast<const uint16_t*>(op.x);
  const auto count = static_cast<float>(op.features);
  const int64_t first = int64_t{block_index()} * kStatisticsWarps + warp_index();
  for (int64_t i = first; i < op.num_rows; i += int64_t{grid_size()} * kStatisticsWarps) {
    const int64_t row = op.rows != nullptr ? op.rows[i] : i;
    const uint16_t* own = x + row * op.x_stride;
    float sum = 0.0f, squares = 0.0f;
    visit_row<T>(own, op.features, [&](float number) { sum += number; });
    const float mean = sum_of_warp(sum) / count;
    visit_row<T>(own, op.features, [&](float number) {
      const float shift = number - mean;
      squares += shift * shift;
    });
    squares = sum_of_warp(squares);
    if (lane_index() == 0) {
      op.parts[row * 2] = mean;
      op.parts[row * 2 + 1] = squares;
    }
  }
}

}  // namespace beit3_fast::cuda
