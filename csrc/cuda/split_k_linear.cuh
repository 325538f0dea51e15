// expert_linear for compute capability 9.0 where tiles are few: the blocks of a cluster have one
// tile of 64 rows x 128 columns, and a share of K each.
//
// A block sends what it has summed to the block that finishes those columns, which adds up the
// shares in the order of K. The first block joins the moments of all columns.
#pragma once

#include "expert_linear.cuh"

namespace beit3_fast::cuda {

template <int kShares>
struct SplitKShape : SlotShape<1, 1, 1, kShares> {
  static constexpr int kSlots = 6;
  static constexpr int kThreads = 256;  // a warp group that loads, one that computes
  static constexpr int kRingBytes = kSlots * (SplitKShape::kSlotBytes + 16);
  static constexpr int kOwnColumns = kTileColumns / kShares;
  static constexpr int kSumsBytes = kBandRows * kTileColumns * 4;
  static constexpr int kMomentsBytes = kBandRows * kShares * 8;
  static constexpr int kBytes = kTileAlignment + kRingBytes + kSumsBytes + kMomentsBytes;
};

// The warp group that computes. All threads of the cluster meet between its steps.
template <class T, class Shape>
struct SplitKConsumer {
  static constexpr int kOwnNumbers = Shape::kOwnColumns / 2;  // of a thread
  const ExpertLinear& op;
  const LinearRing<Shape> ring;
  const LinearTile tile;
  const int rank;
  LinearRow rows[2] = {};

  // Four numbers of a thread, from that rank's share of K.
  __device__ uint32_t sums_at(int from, int i) const {
    const int place = (from * kOwnNumbers / 4 + i) * 128 + thread_index() % 128;
    return ring.base + Shape::kRingBytes + place * 16;
  }
  // Mean and squared deviations of a row in that rank's columns.
  __device__ uint32_t moments_at(int from, int row) const {
    return ring.base + Shape::kRingBytes + Shape::kSumsBytes + (from * kBandRows + row) * 8;
  }
  __device__ float columns_of(int from) const {
    const int left = static_cast<int>(op.out_features) - tile.column - from * Shape::kOwnColumns;
    return static_cast<float>(max(0, min(left, Shape::kOwnColumns)));
  }

  __device__ void send_sums() {
    take_rows_of_tile<1>(op, tile, warp_index() % 4, rows);
    const DepthRange depth = own_depth<Shape>(op);
    float sums[1][kTileColumns / 2];
    LinearConsumer<T, Shape>{op, ring, 0}.multiply(sums, 0, depth.end - depth.first);
#pragma unroll
    for (int to = 0; to < Shape::kShares; ++to) {
#pragma unroll
      for (int i = 0; i < kOwnNumbers / 4; ++i) {
        store_four_in_cluster(in_cluster(sums_at(rank, i), to), &sums[0][to * kOwnNumbers + 4 * i]);
      }
    }
  }

  __device__ void finish_own_columns() const {
    float sums[1][kOwnNumbers] = {};
#pragma unroll
    for (int from = 0; from < Shape::kShares; ++from) {
#pragma unroll
      for (int i = 0; i < kOwnNumbers / 4; ++i) {
        float four[4];
        load_four_shared(four, sums_at(from, i));
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[0][4 * i + j] += four[j];
      }
    }
    LinearTile own = tile;
    own.column += rank * Shape::kOwnColumns;
    LinearMoments moments[2];
    finish_columns<T, 1, false, Shape::kOwnColumns>(op, own, rows, sums, moments);
    if (op.y_parts == nullptr) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      moments[r].join(columns_of(rank) / 4.0f);
      if (lane_index() % 4 != 0) continue;
      const int row = warp_index() % 4 * 16 + r * 8 + lane_index() / 4;
      store_two_in_cluster(in_cluster(moments_at(rank, row), 0), moments[r].mean,
                           moments[r].squares);
    }
  }

  // Chan's combination of the columns of all blocks, a thread a row.
  __device__ void store_joined_moments() const {
    const int row = thread_index() % 128;
    if (rank != 0 || row >= min(kBandRows, tile.end - tile.first)) return;
    float mean = 0.0f, squares = 0.0f, columns = 0.0f;
#pragma unroll
    for (int from = 0; from < Shape::kShares; ++from) {
      mean += load_shared(moments_at(from, row)) * columns_of(from);
      columns += columns_of(from);
    }
    mean *= reciprocal_fast(columns);
#pragma unroll
    for (int from = 0; from < Shape::kShares; ++from) {
      const float shift = load_shared(moments_at(from, row)) - mean;
      squares += load_shared(moments_at(from, row) + 4) + shift * shift * columns_of(from);
    }
    float* part = part_of(op, tile, LinearRow{tile.first + row, true, 0.0f, 1.0f}.row(op));
    part[0] = mean;
    part[1] = squares;
  }
};

// A cluster for every tile.
template <class T, bool kGathered, int kShares>
__global__ void __launch_bounds__(SplitKShape<kShares>::kThreads, 1)
    multiply_experts_split_k(const __grid_constant__ LinearMaps maps,
                             const __grid_constant__ ExpertLinear op) {
  using Shape = SplitKShape<kShares>;
  const LinearRing<Shape> ring{shared_memory(kTileAlignment)};
  if (thread_index() == 0) ring.prepare(kGathered ? GatheringProducer<Shape>::kArrivals : 1);
  // All blocks have begun: they may be written to.
  sync_cluster();
  SplitKConsumer<T, Shape> consumer{op, ring, LinearTiles<Shape>{op}.at(0), cluster_rank()};
  const bool computes = warp_index() >= 4;
  if (computes) {
    consumer.send_sums();
  } else if constexpr (kGathered) {
    GatheringProducer<Shape>{maps, op, ring}.run();
  } else {
    if (thread_index() == 0) LinearProducer<Shape>{maps, op, ring}.run();
  }
  sync_cluster();
  if (computes) consumer.finish_own_columns();
  if (op.y_parts == nullptr) return;
  sync_cluster();
  if (computes) consumer.store_joined_moments();
}

}  // namespace beit3_fast::cuda
