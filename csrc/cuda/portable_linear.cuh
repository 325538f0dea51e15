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

struct PortableLinearShape {
  static constexpr int kStages = 2;
  static constexpr int kThreads = 128;
  static constexpr int kRowBytes = kTileDepth * 2;
  static constexpr int kBands = 2;
  static constexpr int kTileRows = kBands * kBandRows;  // as many as columns
  static constexpr int kOperandBytes = kTileRows * kRowBytes;
  static constexpr int kAlignment = 128;
  static constexpr int kBytes = kAlignment + 2 * kStages * kOperandBytes;
};

template <class T>
struct PortableLinear {
  using Shape = PortableLinearShape;
  static constexpr int kPasses = Shape::kTileRows / 16;  // 8 threads copy the 128 bytes of a row
  const ExpertLinear& op;
  const LinearTile tile;
  const uint32_t base;
  int rows[kPasses];  // of x, that this thread copies
  float sums[Shape::kBands][kTileColumns / 2];

  __device__ uint32_t x_tile(int step) const {
    return base + step % Shape::kStages * 2 * Shape::kOperandBytes;
  }
  __device__ uint32_t weight_tile(int step) const { return x_tile(step) + Shape::kOperandBytes; }

  // Where 16 bytes of a row lie in a tile: neighbouring rows in different banks.
  __device__ static uint32_t chunk_at(uint32_t tile, int row, int chunk) {
    return tile + row * Shape::kRowBytes + (chunk ^ row % 8) * 16;
  }

  // Places past the expert's last repeat it.
  __device__ void take_rows() {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int place = min(tile.first + thread_index() / 8 + 16 * i, tile.end - 1);
      rows[i] = op.rows == nullptr ? place : static_cast<int>(op.rows[place]);
    }
  }

  // Columns past the last, and depth past the last, are zeros.
  __device__ void begin_step(int step) const {
    const int chunk = thread_index() % 8;
    const int depth = step * kTileDepth + 8 * chunk;
    const bool real = depth < op.in_features;
    const auto* x = static_cast<const uint16_t*>(op.x) + (real ? depth : 0);
    const auto* weights = static_cast<const uint16_t*>(op.weights) + (real ? depth : 0) +
                          tile.expert * op.out_features * op.in_features;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = thread_index() / 8 + 16 * i;
      const int column = tile.column + row;
      const bool real_column = column < op.out_features;
      cp_async_16(chunk_at(x_tile(step), row, chunk), x + rows[i] * op.x_stride, real ? 16 : 0);
      cp_async_16(chunk_at(weight_tile(step), row, chunk),
                  weights + (real_column ? column : 0) * op.in_features,
                  real && real_column ? 16 : 0);
    }
  }

  __device__ void multiply(int step) {
    const int lane = lane_index();
#pragma unroll
    for (int depth = 0; depth < kTileDepth / 8; depth += 2) {
      uint32_t x[Shape::kBands][4];
#pragma unroll
      for (int band = 0; band < Shape::kBands; ++band) {
        const int row = kBandRows * band + 16 * warp_index() + lane % 16;
        load_matrices(x[band], chunk_at(x_tile(step), row, depth + lane / 16));
      }
#pragma unroll
      for (int column = 0; column < kTileColumns; column += 16) {
        uint32_t w[4];
        const int row = column + lane / 16 * 8 + lane % 8;
        load_matrices(w, chunk_at(weight_tile(step), row, depth + lane / 8 % 2));
#pragma unroll
        for (int band = 0; band < Shape::kBands; ++band) {
          mma<T>(sums[band] + column / 2, x[band], w[0], w[1]);
          mma<T>(sums[band] + column / 2 + 4, x[band], w[2], w[3]);
        }
      }
    }
  }

  __device__ void run() {
    const int steps = depth_steps(op);
    take_rows();
#pragma unroll
    for (int i = 0; i < kTileColumns; ++i)
      sums[i / (kTileColumns / 2)][i % (kTileColumns / 2)] = 0.0f;
    begin_step(0);
    cp_async_commit();
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) begin_step(step + 1);
      cp_async_commit();
      cp_async_wait<1>();
      sync_block();
      multiply(step);
      sync_block();
    }
    cp_async_wait<0>();
    LinearRow own[2 * Shape::kBands];
    take_rows_of_tile<Shape::kBands>(op, tile, warp_index(), own);
    finish_tile<T, Shape::kBands>(op, tile, own, sums);
  }
};

template <class T>
__global__ void __launch_bounds__(PortableLinearShape::kThreads, 2)
    multiply_experts_portable(const __grid_constant__ ExpertLinear op) {
  const uint32_t base = shared_memory(PortableLinearShape::kAlignment);
  PortableLinear<T>{op, tile_at(op, PortableLinearShape::kBands, block_index()), base}.run();
}

}  // namespace beit3_fast::cuda
