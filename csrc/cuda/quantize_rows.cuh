// Rows of bfloat16 as a product in 8 bits reads them, with the moments of every 128 columns for the
// LayerNorm in front of it. A warp has a row; half of it has the 128 columns that share a scale.
#pragma once

#include "float8_scale.cuh"
#include "float8_tiles.h"

namespace beit3_fast::cuda {

constexpr int kQuantizeWarps = 4;
constexpr int kLaneColumns = 8;

__device__ inline float sum_of_half(float value) {
  for (int mask = 8; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ inline float max_of_half(float value) {
  for (int mask = 8; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// The lane's eight columns of a row, and what its half warp says of all 128.
struct QuantizedColumns {
  const QuantizeRows& op;
  const int64_t row;
  const int column;
  float numbers[kLaneColumns];

  __device__ QuantizedColumns(const QuantizeRows& op, int64_t row, int column)
      : op(op), row(row), column(column), numbers{} {
    if (!real()) return;
    uint32_t words[4];
    load_16_bytes(words, static_cast<const uint16_t*>(op.x) + row * op.x_stride + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      numbers[2 * i] = low_of<BFloat16>(words[i]);
      numbers[2 * i + 1] = high_of<BFloat16>(words[i]);
    }
  }

  __device__ bool real() const { return column < op.features; }
  __device__ int64_t block() const {
    const int64_t blocks = (op.features + Float8Linear::kBlock - 1) / Float8Linear::kBlock;
    return row * blocks + column / Float8Linear::kBlock;
  }
  // The first lane of a half warp, where it has columns, speaks for it.
  __device__ bool speaks() const { return real() && lane_index() % 16 == 0; }

  __device__ void store() const {
    float largest = 0.0f;
    for (const float number : numbers) largest = fmaxf(largest, fabsf(number));
    const Float8Scale unit(max_of_half(largest));
    float scaled[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) scaled[i] = numbers[i] * unit.inverse;
    if (real()) {
      store_two_words(static_cast<uint8_t*>(op.rounded) + row * op.features + column,
                      pack4_e4m3(scaled[0], scaled[1], scaled[2], scaled[3]),
                      pack4_e4m3(scaled[4], scaled[5], scaled[6], scaled[7]));
    }
    if (speaks()) op.scales[block()] = unit.scale;
  }

  __device__ void store_moments() const {
    const int64_t left = op.features - column / Float8Linear::kBlock * Float8Linear::kBlock;
    const auto count = static_cast<float>(min(left, int64_t{Float8Linear::kBlock}));
    float sum = 0.0f, squares = 0.0f;
    for (const float number : numbers) sum += number;
    const float mean = sum_of_half(sum) / count;
    for (const float number : numbers) squares += (number - mean) * (number - mean);
    squares = sum_of_half(real() ? squares : 0.0f);
    if (!speaks()) return;
    op.parts[2 * block()] = mean;
    op.parts[2 * block() + 1] = squares;
  }
};

__global__ void __launch_bounds__(32 * kQuantizeWarps)
    quantize(const __grid_constant__ QuantizeRows op) {
  const int64_t first = int64_t{block_index()} * kQuantizeWarps + warp_index();
  for (int64_t row = first; row < op.num_rows; row += int64_t{grid_size()} * kQuantizeWarps) {
    for (int column = 0; column < op.features; column += 32 * kLaneColumns) {
      const QuantizedColumns own(op, row, column + lane_index() * kLaneColumns);
      own.store();
      if (op.parts != nullptr) own.store_moments();
    }
  }
}

}  // namespace beit3_fast::cuda
