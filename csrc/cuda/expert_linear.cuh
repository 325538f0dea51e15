// expert_linear for compute capability 9.0: a persistent thread block of one warp group that loads
// and two that compute.
//
// Tiles of 128 or 64 rows x 128 columns come through one ring of slots, in the order in which they
// are used. The two consumers have every other tile each and take turns with the tensor cores:
// while one multiplies, the other finishes its tile.
//
// Blocks of a cluster have row tiles that follow each other, in one or two columns of tiles, at the
// same time. Each loads a share of the weights for all blocks of its columns, and of the rows for
// all blocks of its row tile, into slots that these have left.
#pragma once

#include "hopper.cuh"
#include "linear_epilogue.cuh"

namespace beit3_fast::cuda {

struct LinearMaps {
  TensorMap x;  // not used where rows are gathered
  TensorMap weights;
};

// What the kernels read through the accelerator. Returns why it does not take the operands, or
// null.
inline const char* make_maps(LinearMaps& maps, const ExpertLinear& op, int bands, int high,
                             int wide) {
  const char* obstacle = nullptr;
  if (op.rows == nullptr) obstacle = make_tensor_map(maps.x, rows_of_x(op, bands, wide));
  if (obstacle != nullptr) return obstacle;
  return make_tensor_map(maps.weights, rows_of_weights(op, high));
}

// Blocks of a cluster, as LinearPlan has them, and what a slot of their rings holds of a step.
template <int kBands, int kHighTiles, int kWideTiles, int kDepthShares>
struct SlotShape {
  static constexpr int kHigh = kHighTiles;
  static constexpr int kWide = kWideTiles;
  static constexpr int kShares = kDepthShares;
  static constexpr int kBlocks = kHigh * kWide * kShares;
  static constexpr bool kLoadsForOthers = kHigh * kWide > 1;
  static constexpr int kRowBytes = kTileDepth * 2;
  static constexpr int kRowsBytes = kBands * kBandRows * kRowBytes;
  static constexpr int kWeightBytes = kTileColumns * kRowBytes;
  static constexpr int kSlotBytes = kRowsBytes + kWeightBytes;
};

template <int kBands, int kHigh = 1, int kWide = 1>
struct LinearShape : SlotShape<kBands, kHigh, kWide, 1> {
  static constexpr int kSlots = kBands == 2 ? 6 : 8;
  static constexpr int kThreads = 384;
  static constexpr int kBytes = kTileAlignment + kSlots * (LinearShape::kSlotBytes + 16);
};

// Steps along K of tiles, one after the other, and the slots they go through.
template <class Shape>
struct LinearRing {
  uint32_t base;

  __device__ uint32_t rows(int step) const {
    return base + step % Shape::kSlots * Shape::kSlotBytes;
  }
  __device__ uint32_t weights(int step) const { return rows(step) + Shape::kRowsBytes; }
  __device__ uint32_t full(int step) const {
    return base + Shape::kSlots * Shape::kSlotBytes + step % Shape::kSlots * 16;
  }
  __device__ uint32_t free(int step) const { return full(step) + 8; }
  __device__ static uint32_t parity(int step) { return step / Shape::kSlots % 2; }

  // `arrivals`: how many threads say that a slot is full. Four warps of every block into which this
  // one loads say that it is free.
  __device__ void prepare(int arrivals) const {
    for (int i = 0; i < Shape::kSlots; ++i) {
      barrier_init(full(i), arrivals);
      barrier_init(free(i), 4 * (Shape::kHigh + Shape::kWide - 1));
    }
    fence_barrier_init();
  }

  // This warp's products have read the slot. All blocks that write into it are told: by no more
  // than an arrival, as other blocks' writes are the accelerator's, these reads the tensor cores'.
  __device__ void leave(int step) const {
    if constexpr (!Shape::kLoadsForOthers) {
      if (lane_index() == 0) barrier_arrive(free(step));
    } else {
      const int other = lane_index(), own = cluster_rank();
      const bool loads = Shape::kWide == 1 || other % Shape::kHigh == own % Shape::kHigh ||
                         other / Shape::kHigh == own / Shape::kHigh;
      if (other < Shape::kBlocks && loads) barrier_arrive_in_cluster(free(step), other);
    }
  }
};

// The tiles of a block: its own of those of its cluster.
template <class Shape>
struct LinearTiles {
  static constexpr int kBands = Shape::kRowsBytes / (kBandRows * Shape::kRowBytes);
  const ExpertLinear& op;

  // The block's row and column of tiles in its cluster.
  __device__ static int row() {
    if constexpr (Shape::kHigh == 1) {
      return 0;
    } else {
      return cluster_rank() % Shape::kHigh;
    }
  }
  __device__ static int column() {
    if constexpr (Shape::kWide == 1) {
      return 0;
    } else {
      return cluster_rank() / Shape::kHigh;
    }
  }

  __device__ int count() const {
    const int first = block_index() / Shape::kBlocks, clusters = grid_size() / Shape::kBlocks;
    const int all = tile_count(op, kBands * Shape::kHigh, Shape::kWide);
    return (all - first + clusters - 1) / clusters;
  }

  // Past the rows of its expert, and past the last column, a tile holds no real ones.
  __device__ LinearTile at(int i) const {
    const int index = (block_index() + i * grid_size()) / Shape::kBlocks;
    LinearTile tile = tile_at(op, kBands * Shape::kHigh, index, Shape::kWide);
    tile.first += row() * kBands * kBandRows;
    tile.column += column() * kTileColumns;
    return tile;
  }
};

// Steps [first, end) along K: all, or this block's share.
struct DepthRange {
  int first;
  int end;
};

template <class Shape>
__device__ __forceinline__ DepthRange own_depth(const ExpertLinear& op) {
  const int steps = depth_steps(op);
  if constexpr (Shape::kShares == 1) {
    return {0, steps};
  } else {
    const int rank = cluster_rank();
    return {rank * steps / Shape::kShares, (rank + 1) * steps / Shape::kShares};
  }
}

// This block's share of the weights of a step, to the same place in all blocks of its columns.
template <class Shape>
__device__ __forceinline__ void load_weights(const LinearMaps& maps, const LinearRing<Shape>& ring,
                                             int step, int depth, const LinearTile& tile) {
  if constexpr (Shape::kHigh == 1) {
    tma_load_3d(ring.weights(step), maps.weights, ring.full(step), depth, tile.column, tile.expert);
  } else {
    using Tiles = LinearTiles<Shape>;
    const int before = Tiles::row() * (kTileColumns / Shape::kHigh);
    constexpr int kColumn = (1 << Shape::kHigh) - 1;
    const auto blocks = static_cast<uint16_t>(kColumn << Tiles::column() * Shape::kHigh);
    tma_multicast_3d(ring.weights(step) + before * Shape::kRowBytes, maps.weights, ring.full(step),
                     depth, tile.column + before, tile.expert, blocks);
  }
}

// This block's share of the rows of a step, to the same place in all blocks of its row tile.
template <class Shape>
__device__ __forceinline__ void load_rows(const LinearMaps& maps, const LinearRing<Shape>& ring,
                                          int step, int depth, const LinearTile& tile) {
  if constexpr (Shape::kWide == 1) {
    tma_load_2d(ring.rows(step), maps.x, ring.full(step), depth, tile.first);
  } else {
    static_assert(Shape::kHigh == 2 && Shape::kWide == 2);
    using Tiles = LinearTiles<Shape>;
    const int before = Tiles::column() * (Tiles::kBands * kBandRows / Shape::kWide);
    constexpr int kRow = 0b101;
    const auto blocks = static_cast<uint16_t>(kRow << Tiles::row());
    tma_multicast_2d(ring.rows(step) + before * Shape::kRowBytes, maps.x, ring.full(step), depth,
                     tile.first + before, blocks);
  }
}

// Loads what the consumers use, by one thread.
template <class Shape>
struct LinearProducer {
  const LinearMaps& maps;
  const ExpertLinear& op;
  const LinearRing<Shape> ring;

  __device__ void run() const {
    const DepthRange depth = own_depth<Shape>(op);
    const LinearTiles<Shape> tiles{op};
    const int count = tiles.count();
    int step = 0;
    for (int i = 0; i < count; ++i) {
      const LinearTile tile = tiles.at(i);
      for (int k = depth.first; k < depth.end; ++k, ++step) {
        barrier_wait(ring.free(step), ring.parity(step) ^ 1);
        barrier_expect(ring.full(step), Shape::kSlotBytes);
        load_rows(maps, ring, step, k * kTileDepth, tile);
        load_weights(maps, ring, step, k * kTileDepth, tile);
      }
    }
  }
};

// Loads named rows, by a warp group: 8 neighbours copy the 128 bytes of a row. Copies of kUnderWay
// steps are under way while the next one waits for its slot.
template <class Shape>
struct GatheringProducer {
  static constexpr int kUnderWay = 3;
  static constexpr int kArrivals = 1 + 128;
  static constexpr int kOwnRows = Shape::kRowsBytes / Shape::kRowBytes / 16;
  const LinearMaps& maps;
  const ExpertLinear& op;
  const LinearRing<Shape> ring;

  __device__ void take_rows(const LinearTile& tile, int (&rows)[kOwnRows]) const {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int place = tile.first + thread_index() / 8 + 16 * i;
      rows[i] = static_cast<int>(op.rows[min(place, tile.end - 1)]);
    }
  }

  __device__ void copy(const int (&rows)[kOwnRows], int depth, uint32_t to) const {
    const int chunk = thread_index() % 8;
    const int column = depth + 8 * chunk;
    const bool real = column < op.in_features;
    const auto* x = static_cast<const uint16_t*>(op.x) + (real ? column : 0);
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int row = thread_index() / 8 + 16 * i;
      cp_async_16(to + row * Shape::kRowBytes + (chunk ^ row % 8) * 16, x + rows[i] * op.x_stride,
                  real ? 16 : 0);
    }
    cp_async_commit();
  }

  // This thread's copies of a step have come.
  __device__ void announce(int step) const {
    fence_async_proxy();
    barrier_arrive(ring.full(step));
  }

  __device__ void run() const {
    const DepthRange depth = own_depth<Shape>(op);
    const LinearTiles<Shape> tiles{op};
    const int count = tiles.count();
    int step = 0;
    for (int i = 0; i < count; ++i) {
      const LinearTile tile = tiles.at(i);
      int rows[kOwnRows];
      take_rows(tile, rows);
      for (int k = depth.first; k < depth.end; ++k, ++step) {
        barrier_wait(ring.free(step), ring.parity(step) ^ 1);
        if (thread_index() == 0) {
          barrier_expect(ring.full(step), Shape::kWeightBytes);
          load_weights(maps, ring, step, k * kTileDepth, tile);
        }
        copy(rows, k * kTileDepth, ring.rows(step));
        if (step < kUnderWay) continue;
        cp_async_wait<kUnderWay>();
        announce(step - kUnderWay);
      }
    }
    cp_async_wait<0>();
    for (int last = max(0, step - kUnderWay); last < step; ++last) announce(last);
  }
};

// A warp group on every other tile.
template <class T, class Shape>
struct LinearConsumer {
  static constexpr int kBands = LinearTiles<Shape>::kBands;
  using Sums = float[kBands][kTileColumns / 2];
  const ExpertLinear& op;
  const LinearRing<Shape> ring;
  const int group;

  // Barrier 1 + g: group g's turn to multiply.
  __device__ void take_turn() const { sync_named(1 + group, 256); }
  __device__ void pass_turn() const { arrive_named(2 - group, 256); }

  __device__ void begin_step(Sums& sums, int step, bool add) const {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTileDepth / 16; ++i) {
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        wgmma<T, kTileColumns>(
            sums[band],
            descriptor_k_major(ring.rows(step) + band * kBandRows * Shape::kRowBytes + 32 * i),
            descriptor_k_major(ring.weights(step) + 32 * i), add || i > 0);
      }
    }
    wgmma_commit();
  }

  // A slot is free again one step later, when its products have surely ended.
  __device__ void multiply(Sums& sums, int first, int steps) const {
    for (int step = first; step < first + steps; ++step) {
      barrier_wait(ring.full(step), ring.parity(step));
      begin_step(sums, step, step > first);
      if (step == first) continue;
      wgmma_wait<1>();
      ring.leave(step - 1);
    }
    if constexpr (Shape::kShares == 1) pass_turn();
    if constexpr (kBands == 2) {
      wgmma_wait<0>(sums[0], sums[1]);
    } else {
      wgmma_wait<0>(sums[0]);
    }
    ring.leave(first + steps - 1);
  }

  __device__ void run() const {
    const int steps = depth_steps(op);
    const LinearTiles<Shape> tiles{op};
    const int count = tiles.count();
    if (group == 1) pass_turn();
    for (int i = group; i < count; i += 2) {
      const LinearTile tile = tiles.at(i);
      LinearRow rows[2 * kBands];
      take_rows_of_tile<kBands>(op, tile, warp_index() % 4, rows);
      Sums sums;
      take_turn();
      multiply(sums, i * steps, steps);
      if (Shape::kWide > 1 && tile.column >= op.out_features) continue;
      finish_tile<T, kBands>(op, tile, rows, sums);
    }
    // The turn that was passed last.
    if (group == count % 2) take_turn();
  }
};

template <class T, int kBands, bool kGathered, int kHigh, int kWide>
__global__ void __launch_bounds__(LinearShape<kBands>::kThreads, 1)
    multiply_experts(const __grid_constant__ LinearMaps maps,
                     const __grid_constant__ ExpertLinear op) {
  using Shape = LinearShape<kBands, kHigh, kWide>;
  static_assert(!kGathered || kWide == 1, "named rows are loaded by each block for itself");
  const LinearRing<Shape> ring{shared_memory(kTileAlignment)};
  if (thread_index() == 0) ring.prepare(kGathered ? GatheringProducer<Shape>::kArrivals : 1);
  if constexpr (Shape::kBlocks == 1) {
    sync_block();
  } else {
    sync_cluster();
  }
  if (warp_index() < 4) {
    lower_registers<kGathered ? 40 : 24>();
    if constexpr (kGathered) {
      GatheringProducer<Shape>{maps, op, ring}.run();
    } else {
      if (thread_index() == 0) LinearProducer<Shape>{maps, op, ring}.run();
    }
  } else {
    raise_registers<kGathered ? 232 : 240>();
    LinearConsumer<T, Shape>{op, ring, warp_index() / 4 - 1}.run();
  }
  // No block ends while another one may still tell it that a slot is free.
  if constexpr (Shape::kBlocks > 1) sync_cluster();
}

}  // namespace beit3_fast::cuda
