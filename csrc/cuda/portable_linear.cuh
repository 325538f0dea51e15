// expert_linear for processors without warp-group products (compute capability 8.0 and newer):
// mma.sync and cp.async.
//
// A thread block has one tile of 128 x 128: four warps of 2 x 16 rows each, two stages of 64 along
// K. Two thread blocks share a multiprocessor, so that one's epilogue and loads run beside the
// other's products. The sums lie in registers as those of the warp groups do, and the epilogue is
// the same.
#pragma once

#include "linear_epilogue.cuh"

namespace beit3_fast::cuda {

template <int kRowBands>
struct PortableTileShape {
  static constexpr int kStages = 2;
  static constexpr int kThreads = 128;
  static constexpr int kRowBytes = kTileDepth * 2;
  static constexpr int kBands = kRowBands;
  static constexpr int kTileRows = kBands * kBandRows;
  static constexpr int kRowsBytes = kTileRows * kRowBytes;
  static constexpr int kStageBytes = kRowsBytes + kTileColumns * kRowBytes;
  static constexpr int kAlignment = 128;
  static constexpr int kBytes = kAlignment + kStages * kStageBytes;
};
using PortableLinearShape = PortableTileShape<2>;

// The tiles of a step, by all threads; numbers along K in units of 16 bits.
template <class Shape>
struct PortableTiles {
  static constexpr int kRowsAtOnce = 16;  // 8 threads copy the 128 bytes of a row
  static constexpr int kPasses = Shape::kTileRows / kRowsAtOnce;
  const ExpertLinear& op;
  const LinearTile tile;
  const uint32_t base;
  const int64_t depth;
  const int64_t x_stride;
  int rows[kPasses];  // of x, that this thread copies

  __device__ uint32_t x_tile(int step) const {
    return base + step % Shape::kStages * Shape::kStageBytes;
  }
  __device__ uint32_t weight_tile(int step) const { return x_tile(step) + Shape::kRowsBytes; }

  // Where 16 bytes of a row lie in a tile: neighbouring rows in different banks.
  __device__ static uint32_t chunk_at(uint32_t tile, int row, int chunk) {
    return tile + row * Shape::kRowBytes + (chunk ^ row % 8) * 16;
  }

  // Places past the expert's last repeat it.
  __device__ void take_rows() {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int place = min(tile.first + thread_index() / 8 + kRowsAtOnce * i, tile.end - 1);
      rows[i] = op.rows == nullptr ? place : static_cast<int>(op.rows[place]);
    }
  }

  // Columns past the last, and depth past the last, are zeros.
  __device__ void begin_step(int step) const {
    const int chunk = thread_index() % 8;
    const int place = step * kTileDepth + 8 * chunk;
    const bool real = place < depth;
    const auto* x = static_cast<const uint16_t*>(op.x) + (real ? place : 0);
    const auto* weights = static_cast<const uint16_t*>(op.weights) + (real ? place : 0) +
                          tile.expert * op.out_features * depth;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = thread_index() / 8 + kRowsAtOnce * i;
      cp_async_16(chunk_at(x_tile(step), row, chunk), x + rows[i] * x_stride, real ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < kTileColumns / kRowsAtOnce; ++i) {
      const int row = thread_index() / 8 + kRowsAtOnce * i;
      const int column = tile.column + row;
      const bool real_column = column < op.out_features;
      cp_async_16(chunk_at(weight_tile(step), row, chunk),
                  weights + (real_column ? column : 0) * depth, real && real_column ? 16 : 0);
    }
  }

  // `chunk`: two of 16 bytes along K. Of x 16 rows of a band for each warp, of the weights 16.
  __device__ void load_x(uint32_t (&x)[4], int step, int band, int chunk) const {
    const int row = kBandRows * band + 16 * warp_index() + lane_index() % 16;
    load_matrices(x, chunk_at(x_tile(step), row, chunk + lane_index() / 16));
  }
  __device__ void load_weights(uint32_t (&w)[4], int step, int column, int chunk) const {
    const int row = column + lane_index() / 16 * 8 + lane_index() % 8;
    load_matrices(w, chunk_at(weight_tile(step), row, chunk + lane_index() / 8 % 2));
  }

  // Calls multiply(step) for each step, whose tiles have come then.
  template <class Multiply>
  __device__ void visit(int steps, Multiply multiply) {
    take_rows();
    begin_step(0);
    cp_async_commit();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) begin_step(step + 1);
      cp_async_commit();
      cp_async_wait<1>();
      sync_block();
      multiply(step);
      sync_block();
    }
    cp_async_wait<0>();
  }
};

using PortableSums = float[PortableLinearShape::kBands][kTileColumns / 2];

template <class T>
__device__ __forceinline__ void multiply_portable(const PortableTiles<PortableLinearShape>& tiles,
                                                  int step, PortableSums& sums) {
  constexpr int kBands = PortableLinearShape::kBands;
#pragma unroll
  for (int chunk = 0; chunk < kTileDepth / 8; chunk += 2) {
    uint32_t x[kBands][4];
#pragma unroll
    for (int band = 0; band < kBands; ++band) tiles.load_x(x[band], step, band, chunk);
#pragma unroll
    for (int column = 0; column < kTileColumns; column += 16) {
      uint32_t w[4];
      tiles.load_weights(w, step, column, chunk);
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        mma<T>(sums[band] + column / 2, x[band], w[0], w[1]);
        mma<T>(sums[band] + column / 2 + 4, x[band], w[2], w[3]);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(PortableLinearShape::kThreads, 2)
    multiply_experts_portable(const __grid_constant__ ExpertLinear op) {
  using Shape = PortableLinearShape;
  const LinearTile tile = tile_at(op, Shape::kBands, block_index());
  PortableTiles<Shape> tiles{op,          tile, shared_memory(Shape::kAlignment), op.in_features,
                             op.x_stride, {}};
  PortableSums sums = {};
  tiles.visit(depth_steps(op), [&](int step) { multiply_portable<T>(tiles, step, sums); });
  LinearRow own[2 * Shape::kBands];
  take_rows_of_tile<Shape::kBands>(op, tile, warp_index(), own);
  finish_tile<T, Shape::kBands>(op, tile, own, sums);
}

}  // namespace beit3_fast::cuda
