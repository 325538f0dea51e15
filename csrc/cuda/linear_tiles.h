// How a call of expert_linear is cut into tiles, and which operands the kernel takes. No code of a
// GPU's own.
#pragma once

#include "expert_linear.h"
#include "tensor_map.h"

#ifdef __CUDACC__
#define BEIT3_FAST_BOTH __host__ __device__
#else
#define BEIT3_FAST_BOTH
#endif

namespace beit3_fast::cuda {

// Rows of one product of a warp group. A tile has one such band, or two where there are tiles
// enough.
constexpr int kBandRows = 64;
constexpr int kMostBands = 2;
constexpr int kTileColumns = ExpertLinear::kPartWidth;
constexpr int kTileDepth = 64;
// Row tiles that meet all columns before the next ones do: their rows stay in the L2 cache.
constexpr int kRowTilesTogether = 16;
// Blocks of a cluster, which have row tiles that follow each other and share their weights.
constexpr int kClusterBlocks = 2;

BEIT3_FAST_BOTH inline int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

BEIT3_FAST_BOTH inline int row_tiles(const ExpertLinear& op, int bands, int expert) {
  return tiles_of(static_cast<int>(op.bounds[expert + 1]) - static_cast<int>(op.bounds[expert]),
                  bands * kBandRows);
}

BEIT3_FAST_BOTH inline int column_tiles(const ExpertLinear& op) {
  return tiles_of(static_cast<int>(op.out_features), kTileColumns);
}

BEIT3_FAST_BOTH inline int depth_steps(const ExpertLinear& op) {
  return tiles_of(static_cast<int>(op.in_features), kTileDepth);
}

BEIT3_FAST_BOTH inline int tile_count(const ExpertLinear& op, int bands) {
  int count = 0;
  for (int expert = 0; expert < op.num_experts; ++expert) count += row_tiles(op, bands, expert);
  return count * column_tiles(op);
}

// High tiles read the weights less often; low ones keep more multiprocessors busy.
inline int bands_for(const ExpertLinear& op, int processors) {
  return tile_count(op, kMostBands) >= processors ? kMostBands : 1;
}

// Blocks of a cluster: one where tiles are few, where an expert has one row tile, or where tiles
// without real rows would cost a round.
inline int cluster_for(const ExpertLinear& op, int bands, int processors) {
  const int high = bands * kClusterBlocks, clusters = processors / kClusterBlocks;
  if (bands < kMostBands || clusters == 0) return 1;
  for (int expert = 0; expert < op.num_experts; ++expert) {
    const int own = row_tiles(op, bands, expert);
    if (own > 0 && own < kClusterBlocks) return 1;
  }
  const int rounds = tiles_of(tile_count(op, bands), processors);
  return tiles_of(tile_count(op, high), clusters) <= rounds ? kClusterBlocks : 1;
}

// Blocks that share the depth of a tile: four or two of a cluster where there are multiprocessors
// for all of them at once and each has two steps or more, else one. Of 16 or 18 multiprocessors,
// which can form clusters, four blocks leave two over.
inline int shares_for(const ExpertLinear& op, int bands, int processors) {
  const int tiles = tile_count(op, bands), steps = depth_steps(op);
  if (bands > 1 || tiles == 0) return 1;
  if (tiles <= processors / 16 * 4 && steps >= 8) return 4;
  return tiles <= processors / 2 && steps >= 4 ? 2 : 1;
}

// Places [first, end) of an expert, of which the tile holds the first ones, and its first column.
struct LinearTile {
  int expert;
  int first;
  int end;
  int column;
};

// Tiles count through the experts one after the other.
BEIT3_FAST_BOTH inline LinearTile tile_at(const ExpertLinear& op, int bands, int index) {
  const int columns = column_tiles(op);
  int expert = 0;
  while (index >= row_tiles(op, bands, expert) * columns) {
    index -= row_tiles(op, bands, expert++) * columns;
  }
  const int together =
      bands > kMostBands ? kRowTilesTogether * kMostBands / bands : kRowTilesTogether;
  const int top = index / (together * columns) * together;
  const int left = row_tiles(op, bands, expert) - top;
  const int height = left < together ? left : together;
  const int place = index - top * columns;
  return {expert, static_cast<int>(op.bounds[expert]) + (top + place % height) * bands * kBandRows,
          static_cast<int>(op.bounds[expert + 1]), place / height * kTileColumns};
}

inline TiledTensor rows_of_x(const ExpertLinear& op, int bands) {
  return {
      op.x, 2, {op.in_features, op.num_rows}, {op.x_stride * 2}, {kTileDepth, bands * kBandRows}};
}

// Columns past an expert's last are outside, and no column of the next one. A box is a block's
// share of a tile.
inline TiledTensor rows_of_weights(const ExpertLinear& op, int cluster) {
  return {op.weights,
          3,
          {op.in_features, op.out_features, op.num_experts},
          {op.in_features * 2, op.in_features * op.out_features * 2},
          {kTileDepth, kTileColumns / cluster, 1}};
}

inline bool in_16_bytes(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

inline const char* linear_obstacle(const ExpertLinear& op) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (op.num_experts < 1 || op.num_experts > ExpertLinear::kMaxExperts)
    return "takes one to three experts";
  if (op.in_features < 8 || op.in_features % 8 != 0 || op.out_features < 8 ||
      op.out_features % 8 != 0) {
    return "takes numbers of features that are multiples of 8";
  }
  if (op.num_rows > kMost || op.in_features > kMost || op.out_features > kMost) {
    return "takes at most 2^30 rows and features";
  }
  const bool aligned = in_16_bytes(op.x, op.x_stride) && in_16_bytes(op.weights, 0) &&
                       in_16_bytes(op.residual, op.residual_stride) &&
                       in_16_bytes(op.z, op.y_stride) && in_16_bytes(op.y, op.y_stride);
  return aligned ? nullptr : "takes rows that begin at multiples of 16 bytes";
}

}  // namespace beit3_fast::cuda
