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

// `wide`: of so many column tiles each.
BEIT3_FAST_BOTH inline int tile_count(const ExpertLinear& op, int bands, int wide = 1) {
  int count = 0;
  for (int expert = 0; expert < op.num_experts; ++expert) count += row_tiles(op, bands, expert);
  return count * tiles_of(column_tiles(op), wide);
}

// How a launch for compute capability 9.0 is laid out. Blocks of a cluster have `high` row tiles
// that follow each other in `wide` columns of tiles, and load for each other what they share; or,
// where `shares` is more than one, a share of the depth of one tile each.
struct LinearPlan {
  int bands = 1;
  int high = 1;
  int wide = 1;
  int shares = 1;
};

// Clusters of four leave over two of the 18 multiprocessors that some groups of them have.
inline int clusters_at_once(int processors, int blocks) {
  return blocks == 4 ? processors / 16 * 4 : processors / blocks;
}

// Whether clusters of two row tiles have two in every expert, and cost no round in which blocks
// have tiles without real rows.
inline bool clusters_pay(const ExpertLinear& op, int processors) {
  if (processors < 2) return false;
  for (int expert = 0; expert < op.num_experts; ++expert) {
    if (row_tiles(op, kMostBands, expert) == 1) return false;
  }
  const int rounds = tiles_of(tile_count(op, kMostBands), processors);
  return tiles_of(tile_count(op, 2 * kMostBands), processors / 2) <= rounds;
}

// Whether clusters of two times two tiles, which load a third less than those of two, cost at most
// a sixteenth more rounds. Named rows each block loads for itself.
inline bool square_clusters_pay(const ExpertLinear& op, int processors) {
  const int at_once = clusters_at_once(processors, 4);
  if (op.rows != nullptr || at_once == 0) return false;
  const int rounds = tiles_of(tile_count(op, 2 * kMostBands), processors / 2);
  return tiles_of(tile_count(op, 2 * kMostBands, 2), at_once) * 16 <= rounds * 17;
}

// As many as there is room for at once, with two steps or more for each.
inline int shares_for(const ExpertLinear& op, int processors) {
  const int tiles = tile_count(op, 1), steps = depth_steps(op);
  for (int shares = 4; shares > 1; shares /= 2) {
    const bool allowed = shares <= op.most_blocks && steps >= 2 * shares;
    if (allowed && tiles <= clusters_at_once(processors, shares)) return shares;
  }
  return 1;
}

// High tiles read the weights less often; low ones keep more multiprocessors busy.
inline int bands_for(const ExpertLinear& op, int processors) {
  return tile_count(op, kMostBands) >= processors ? kMostBands : 1;
}

inline LinearPlan plan_for(const ExpertLinear& op, int processors) {
  LinearPlan plan;
  plan.bands = bands_for(op, processors);
  if (plan.bands == 1) {
    plan.shares = shares_for(op, processors);
    return plan;
  }
  if (op.most_blocks >= 2 && clusters_pay(op, processors)) plan.high = 2;
  if (op.most_blocks >= 4 && plan.high == 2 && square_clusters_pay(op, processors)) plan.wide = 2;
  return plan;
}

// Places [first, end) of an expert, of which the tile holds the first ones, and its first column.
struct LinearTile {
  int expert;
  int first;
  int end;
  int column;
};

// Tiles count through the experts one after the other; `wide`: of so many column tiles each.
BEIT3_FAST_BOTH inline LinearTile tile_at(const ExpertLinear& op, int bands, int index,
                                          int wide = 1) {
  const int columns = tiles_of(column_tiles(op), wide);
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
          static_cast<int>(op.bounds[expert + 1]), place / height * wide * kTileColumns};
}

// A box is the share of a tile that one of its `wide` blocks loads.
inline TiledTensor rows_of_x(const ExpertLinear& op, int bands, int wide) {
  return {op.x,
          2,
          {op.in_features, op.num_rows},
          {op.x_stride * 2},
          {kTileDepth, bands * kBandRows / wide}};
}

// Columns past an expert's last are outside, and no column of the next one. A box is the share of a
// tile that one of its `high` blocks loads.
inline TiledTensor rows_of_weights(const ExpertLinear& op, int high) {
  return {op.weights,
          3,
          {op.in_features, op.out_features, op.num_experts},
          {op.in_features * 2, op.in_features * op.out_features * 2},
          {kTileDepth, kTileColumns / high, 1}};
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
