// Products in 8 bits for processors without warp-group products (compute capability 8.9 and newer):
// the tiles of portable_linear.cuh, a row of which holds 128 numbers here.
//
// What the tensor cores keep of a sum is short of fp32, so the products of every 128 along K are
// scaled and added to sums in fp32. There are no registers for the sums of two bands and products.
#pragma once

#include "float8_epilogue.cuh"
#include "float8_tiles.h"
#include "portable_linear.cuh"

namespace beit3_fast::cuda {

using PortableFloat8Shape = PortableTileShape<1>;
using PortableFloat8Tiles = PortableTiles<PortableFloat8Shape>;

__device__ __forceinline__ void add_portable_step(const Float8Linear& op,
                                                  const PortableFloat8Tiles& tiles, int step,
                                                  float (&sums)[kTileColumns / 2]) {
  float scales[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int inside = warp_index() * 16 + r * 8 + lane_index() / 4;
    const int place = min(tiles.tile.first + inside, tiles.tile.end - 1);
    scales[r] = op.x_scales[int64_t{place} * float8_steps(op) + step];
  }
  float products[kTileColumns / 2] = {};
// Not unrolled: where 8-bit operands are widened first, more of them do not fit the registers.
#pragma unroll 1
  for (int chunk = 0; chunk < kTileDepth / 8; chunk += 2) {
    uint32_t x[4];
    tiles.load_x(x, step, 0, chunk);
#pragma unroll
    for (int column = 0; column < kTileColumns; column += 16) {
      uint32_t w[4];
      tiles.load_weights(w, step, column, chunk);
      mma<E4M3>(products + column / 2, x, w[0], w[1]);
      mma<E4M3>(products + column / 2 + 4, x, w[2], w[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTileColumns / 2; ++i) {
    sums[i] = fmaf(products[i], scales[i / 2 % 2], sums[i]);
  }
}

__global__ void __launch_bounds__(PortableFloat8Shape::kThreads, 2)
    multiply_float8_portable(const __grid_constant__ Float8Linear op) {
  using Shape = PortableFloat8Shape;
  const LinearTile tile = tile_at(op, Shape::kBands, block_index());
  const int64_t depth = op.in_features / 2;
  PortableFloat8Tiles tiles{op, tile, shared_memory(Shape::kAlignment), depth, depth, {}};
  float sums[1][kTileColumns / 2] = {};
  tiles.visit(float8_steps(op), [&](int step) { add_portable_step(op, tiles, step, sums[0]); });
  finish_float8_tile<Shape::kBands>(op, tile, warp_index(), sums);
}

}  // namespace beit3_fast::cuda
