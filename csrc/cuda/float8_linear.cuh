// expert_linear of 8-bit numbers for compute capability 9.0: a persistent thread block of two warp
// groups that compute, each on tiles of its own through a ring of its own, and two warps that load.
//
// The tensor cores keep some 14 bits of a sum of 8-bit products. After every 128 along K, which
// share the scales of the rows, what they made is scaled and added to sums in fp32. Registers are
// there for one band's products at a time: while a group adds them up, the other one's go on.
#pragma once

#include "expert_linear.cuh"
#include "float8_epilogue.cuh"
#include "float8_tiles.h"

namespace beit3_fast::cuda {

template <int kBands>
struct Float8Shape : SlotShape<kBands, 1, 1, 1> {
  static constexpr int kSlots = kBands == 2 ? 3 : 4;
  static constexpr int kThreads = 384;
  // Of a group's ring with its barriers, and what aligns the next one.
  static constexpr int kRingBytes = kSlots * Float8Shape::kSlotBytes + kTileAlignment;
  static constexpr int kBytes = kTileAlignment + 2 * kRingBytes;
  static_assert(Float8Shape::kRowBytes == Float8Linear::kBlock);
};

// Loads what a group uses, by one thread.
template <int kBands>
struct Float8Producer {
  using Shape = Float8Shape<kBands>;
  const LinearMaps& maps;
  const Float8Linear& op;
  const LinearRing<Shape> ring;
  const int group;

  __device__ void run() const {
    const int steps = float8_steps(op);
    int step = 0;
    for (int i = block_index() + group * grid_size(); i < tile_count(op, kBands);
         i += 2 * grid_size()) {
      const LinearTile tile = tile_at(op, kBands, i);
      for (int k = 0; k < steps; ++k, ++step) {
        barrier_wait(ring.free(step), ring.parity(step) ^ 1);
        barrier_expect(ring.full(step), Shape::kSlotBytes);
        tma_load_2d(ring.rows(step), maps.x, ring.full(step), k * kTileDepth, tile.first);
        tma_load_3d(ring.weights(step), maps.weights, ring.full(step), k * kTileDepth, tile.column,
                    tile.expert);
      }
    }
  }
};

template <int kBands>
struct Float8Consumer {
  using Shape = Float8Shape<kBands>;
  using Sums = float[kBands][kTileColumns / 2];
  static constexpr int kRows = 2 * kBands;
  const Float8Linear& op;
  const LinearRing<Shape> ring;
  const int group;

  // The places of the thread's rows, as take_rows_of_tile has them.
  __device__ void take_places(const LinearTile& tile, int (&places)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int inside = r / 2 * kBandRows + warp_index() % 4 * 16 + r % 2 * 8 + lane_index() / 4;
      places[r] = min(tile.first + inside, tile.end - 1);
    }
  }

  __device__ void take_scales(const int (&places)[kRows], int k, int steps,
                              float (&scales)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) scales[r] = op.x_scales[int64_t{places[r]} * steps + k];
  }

  __device__ void add_band(Sums& sums, int band, int step, const float (&scales)[kRows]) const {
    float products[kTileColumns / 2];
    const uint32_t rows = ring.rows(step) + band * kBandRows * Shape::kRowBytes;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Shape::kRowBytes / 32; ++i) {
      wgmma<E4M3, kTileColumns>(products, descriptor_k_major(rows + 32 * i),
                                descriptor_k_major(ring.weights(step) + 32 * i), i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>(products);
#pragma unroll
    for (int i = 0; i < kTileColumns / 2; ++i) {
      sums[band][i] = fmaf(products[i], scales[2 * band + i / 2 % 2], sums[band][i]);
    }
  }

  __device__ void multiply(Sums& sums, const LinearTile& tile, int first, int steps) const {
    int places[kRows];
    float scales[kRows], next[kRows];
    take_places(tile, places);
    take_scales(places, 0, steps, next);
    for (int k = 0; k < steps; ++k) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) scales[r] = next[r];
      if (k + 1 < steps) take_scales(places, k + 1, steps, next);
      barrier_wait(ring.full(first + k), ring.parity(first + k));
#pragma unroll
      for (int band = 0; band < kBands; ++band) add_band(sums, band, first + k, scales);
      if (lane_index() == 0) barrier_arrive(ring.free(first + k));
    }
  }

  __device__ void run() const {
    const int steps = float8_steps(op);
    int step = 0;
    for (int i = block_index() + group * grid_size(); i < tile_count(op, kBands);
         i += 2 * grid_size(), step += steps) {
      const LinearTile tile = tile_at(op, kBands, i);
      Sums sums = {};
      multiply(sums, tile, step, steps);
      finish_float8_tile<kBands>(op, tile, warp_index() % 4, sums);
    }
  }
};

template <int kBands>
__global__ void __launch_bounds__(Float8Shape<kBands>::kThreads, 1)
    multiply_float8(const __grid_constant__ LinearMaps maps,
                    const __grid_constant__ Float8Linear op) {
  using Shape = Float8Shape<kBands>;
  const uint32_t base = shared_memory(kTileAlignment);
  const auto ring = [&](int group) { return LinearRing<Shape>{base + group * Shape::kRingBytes}; };
  if (thread_index() == 0) {
    ring(0).prepare(1);
    ring(1).prepare(1);
  }
  sync_block();
  const int warp = warp_index();
  if (warp < 4) {
    lower_registers<24>();
    if (warp < 2 && lane_index() == 0) {
      Float8Producer<kBands>{maps, op, ring(warp), warp}.run();
    }
  } else {
    raise_registers<240>();
    const int group = warp / 4 - 1;
    Float8Consumer<kBands>{op, ring(group), group}.run();
  }
}

}  // namespace beit3_fast::cuda
