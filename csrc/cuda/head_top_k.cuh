// A linear head, the softmax behind it and its best classes (compute capability 8.0 and newer):
// logits live in shared memory only.
//
// A thread block has 256 classes, 32 a warp, and up to kRows rows: weights are the left operand of
// mma.sync and rows the right one, so that few rows cost few products. Both come straight from
// memory into registers (see operand_loads.cuh). For
// every row it leaves the highest logit, the sum of exponentials and its best classes; a warp a row
// joins what all tiles left.
#pragma once

#include <climits>
#include <type_traits>

#include "head_top_k.h"
#include "operand_loads.cuh"
#include "warp.cuh"

namespace beit3_fast::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kHeadWarps = 8;
constexpr int kMostTiles = 8192;  // of which the second kernel keeps a number each in shared memory
constexpr int kWarpClasses = HeadTopK::kTileClasses / kHeadWarps;

__host__ __device__ inline int64_t tiles_of(const HeadTopK& op) {
  return (op.classes + HeadTopK::kTileClasses - 1) / HeadTopK::kTileClasses;
}

// A logit and its class as one number: the higher the logit the larger, and of equals the lower
// class. NaN is above all numbers, as in torch.topk. Zero: nothing.
__device__ inline uint32_t rank_of(float logit) {
  const uint32_t bits = bits_of_float(logit + 0.0f);  // one zero
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float logit_of(uint32_t rank) {
  return float_of_bits((rank >> 31) != 0 ? rank & 0x7fffffffu : ~rank);
}

// What the highest logit is subtracted from: any finite number where all are -inf.
__device__ inline float pivot_of(float highest) { return highest == -INFINITY ? 0.0f : highest; }

template <int kRows>
struct HeadTileShape {
  static constexpr int kThreads = 32 * kHeadWarps;
  static constexpr int kBlocksPerProcessor = 2;
  static constexpr int kSpans = kRows > 16 ? 1 : 2;  // of 32 columns, under way at a time
  static constexpr int kStride = HeadTopK::kTileClasses + 4;
  static constexpr int kBytes = 16 + kRows * kStride * 4;
};

template <class T, int kRows>
struct HeadTile {
  using Shape = HeadTileShape<kRows>;
  using Weights = uint32_t[Shape::kSpans][2][2][4];  // by span, band of 16 classes, half of it
  const HeadTopK& op;
  const int tile;
  const int first_row;
  const uint32_t base;
  const int group = lane_index() / 4;
  const int place = lane_index() % 4;
  float sums[2][kRows / 8][4];

  __device__ HeadTile(const HeadTopK& op, int tile, int first_row, uint32_t base)
      : op(op), tile(tile), first_row(first_row), base(base) {}

  // Within the tile.
  __device__ int class_at(int band, int half) const {
    return warp_index() * kWarpClasses + 16 * band + 8 * half + group;
  }
  __device__ int64_t first_class() const { return int64_t{tile} * HeadTopK::kTileClasses; }

  // Classes, rows and columns past the last are zeros.
  __device__ void load_weights(Weights& words, int depth) const {
    const auto* weight = static_cast<const uint16_t*>(op.weight);
#pragma unroll
    for (int i = 0; i < 4 * Shape::kSpans; ++i) {
      const int column = depth + 32 * (i / 4) + 8 * place;
      const int64_t own = first_class() + class_at(i / 2 % 2, i % 2);
      load_or_clear(words[i / 4][i / 2 % 2][i % 2], weight + own * op.features + column,
                    own < op.classes && column < op.features);
    }
  }

  __device__ void multiply(const Weights& words, int depth) {
    const int64_t first = int64_t{first_row} + group;
    const auto* own = static_cast<const uint16_t*>(op.x) + first * op.x_stride;
#pragma unroll
    for (int span = 0; span < Shape::kSpans; ++span) {
      const int column = depth + 32 * span + 8 * place;
#pragma unroll
      for (int block = 0; block < kRows / 8; ++block) {
        uint32_t x[4];
        load_or_clear(x, own + 8 * block * op.x_stride + column,
                      first + 8 * block < op.num_rows && column < op.features);
#pragma unroll
        for (int band = 0; band < 2; ++band) {
          const auto& left = words[span][band];
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            const uint32_t four[4] = {left[0][i], left[1][i], left[0][i + 1], left[1][i + 1]};
            mma<T>(sums[band][block], four, x[i], x[i + 1]);
          }
        }
      }
    }
  }

  __device__ void walk() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) sums[i / (kRows / 2)][i / 4 % (kRows / 8)][i % 4] = 0.0f;
    constexpr int kDepth = 32 * Shape::kSpans;
    Weights words, next;
    load_weights(next, 0);
    for (int depth = 0; depth < op.features; depth += kDepth) {
#pragma unroll
      for (int i = 0; i < 16 * Shape::kSpans; ++i) {
        words[i / 16][i / 8 % 2][i / 4 % 2][i % 4] = next[i / 16][i / 8 % 2][i / 4 % 2][i % 4];
      }
      load_weights(next, depth + kDepth);
      multiply(words, depth);
    }
  }

  __device__ uint32_t logit_at(int row, int own) const {
    return base + (row * Shape::kStride + own) * 4;
  }

  __device__ float bias_of(int64_t own) const {
    if (op.bias == nullptr || own >= op.classes) return 0.0f;
    return low_of<T>(static_cast<const uint16_t*>(op.bias)[own]);
  }

  __device__ void show() const {
#pragma unroll
    for (int band = 0; band < 2; ++band) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own = class_at(band, half);
        const float bias = bias_of(first_class() + own);
#pragma unroll
        for (int i = 0; i < kRows / 4; ++i) {
          const float sum = sums[band][i / 2][2 * half + i % 2];
          store_shared(logit_at(8 * (i / 2) + 2 * place + i % 2, own), sum + bias);
        }
      }
    }
  }

  // A warp's row: its lane has the classes lane, lane + 32, ...
  __device__ void choose(int row) const {
    constexpr int kOwn = HeadTopK::kTileClasses / 32;
    const int64_t first = first_class();
    const int64_t at = (int64_t{first_row} + row) * tiles_of(op) + tile;
    float logits[kOwn], highest = -INFINITY, sum = 0.0f;
    uint32_t ranks[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int64_t own = first + 32 * i + lane_index();
      logits[i] = own < op.classes ? load_shared(logit_at(row, 32 * i + lane_index())) : -INFINITY;
      highest = fmaxf(highest, logits[i]);
      const bool allowed = op.allowed == nullptr || own >= op.classes || op.allowed[own] != 0;
      ranks[i] = own < op.classes ? rank_of(allowed ? logits[i] : -INFINITY) : 0;
    }
    highest = max_of_warp(highest);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sum += exp2_fast((logits[i] - pivot_of(highest)) * kLog2E);
    sum = sum_of_warp(sum);
    if (lane_index() == 0) {
      op.peaks[2 * at] = highest;
      op.peaks[2 * at + 1] = sum;
    }
    for (int i = 0; i < op.count; ++i) {
      const uint64_t best = take_best(ranks, static_cast<uint32_t>(first));
      if (lane_index() == 0) op.best[at * op.count + i] = best;
    }
  }

  // The best that is left of the warp's ranks; it is not left behind.
  template <int kOwn>
  __device__ static uint64_t take_best(uint32_t (&ranks)[kOwn], uint32_t first) {
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own = max(own, ranks[i]);
    const uint32_t rank = max_of_warp(own);
    if (rank == 0) return 0;
    // From behind, so that the lowest class stays.
    uint32_t lowest = UINT32_MAX;
#pragma unroll
    for (int i = kOwn - 1; i >= 0; --i) {
      if (ranks[i] == rank) lowest = 32 * i + lane_index();
    }
    lowest = ~max_of_warp(~lowest);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (lowest == static_cast<uint32_t>(32 * i + lane_index())) ranks[i] = 0;
    }
    return static_cast<uint64_t>(rank) << 32 | static_cast<uint32_t>(~(first + lowest));
  }

  __device__ void run() {
    walk();
    show();
    sync_block();
    const int64_t rows = min(int64_t{kRows}, op.num_rows - first_row);
    for (int row = warp_index(); row < rows; row += kHeadWarps) choose(row);
  }
};

template <class T, int kRows>
__global__ void __launch_bounds__(HeadTileShape<kRows>::kThreads,
                                  HeadTileShape<kRows>::kBlocksPerProcessor)
    score_classes(const __grid_constant__ HeadTopK op) {
  // Row tiles of the same classes follow each other: the L2 cache has the weights.
  const int row_tiles = static_cast<int>((op.num_rows + kRows - 1) / kRows);
  HeadTile<T, kRows>(op, block_index() / row_tiles, block_index() % row_tiles * kRows,
                     shared_memory(16))
      .run();
}

// A warp joins the tiles of one row. Lane l has the tiles l, l + 32, ..., whose lists it goes down
// from their best; how far it is, it keeps in shared memory.
struct JoinRow {
  const HeadTopK& op;
  const int64_t row;
  const uint32_t base;

  __device__ float* peak(int tile) const { return op.peaks + 2 * (row * tiles_of(op) + tile); }

  __device__ float log_of_sum() const {
    float highest = -INFINITY, sum = 0.0f;
    for (int tile = lane_index(); tile < tiles_of(op); tile += 32) {
      highest = fmaxf(highest, peak(tile)[0]);
    }
    highest = pivot_of(max_of_warp(highest));
    for (int tile = lane_index(); tile < tiles_of(op); tile += 32) {
      sum += peak(tile)[1] * exp2_fast((pivot_of(peak(tile)[0]) - highest) * kLog2E);
    }
    return highest + logf(sum_of_warp(sum));
  }

  __device__ uint32_t taken_at(int tile) const { return base + 4 * tile; }

  __device__ uint64_t best_of_lane() const {
    uint64_t best = 0;
    for (int tile = lane_index(); tile < tiles_of(op); tile += 32) {
      const uint32_t taken = bits_of_float(load_shared(taken_at(tile)));
      if (taken >= op.count) continue;
      best = max(best, op.best[(row * tiles_of(op) + tile) * op.count + taken]);
    }
    return best;
  }

  __device__ void take(int tile) const {
    const uint32_t taken = bits_of_float(load_shared(taken_at(tile)));
    store_shared(taken_at(tile), float_of_bits(taken + 1));
  }

  __device__ void run() const {
    for (int tile = lane_index(); tile < tiles_of(op); tile += 32)
      store_shared(taken_at(tile), 0.0f);
    const float total = log_of_sum();
    uint64_t own = best_of_lane();
    for (int i = 0; i < op.count; ++i) {
      const auto rank = static_cast<uint32_t>(own >> 32);
      const uint32_t highest = max_of_warp(rank);
      const uint32_t low = max_of_warp(rank == highest ? static_cast<uint32_t>(own) : 0u);
      const uint32_t id = ~low;
      if (lane_index() == 0) {
        op.log_p[row * op.count + i] = logit_of(highest) - total;
        op.ids[row * op.count + i] = id;
      }
      const int tile = static_cast<int>(id / HeadTopK::kTileClasses);
      if (tile % 32 != lane_index()) continue;
      take(tile);
      own = best_of_lane();
    }
  }
};

// A template, so that every file that includes this one may.
template <int kWarps = 1>
__global__ void __launch_bounds__(32 * kWarps) join_classes(const __grid_constant__ HeadTopK op) {
  JoinRow{op, block_index(), shared_memory(16)}.run();
}

struct HeadLaunch {
  int blocks;
  int shared_bytes;
};

template <int kRows>
HeadLaunch head_launch(const HeadTopK& op) {
  return {static_cast<int>((op.num_rows + kRows - 1) / kRows * tiles_of(op)),
          HeadTileShape<kRows>::kBytes};
}

constexpr int join_bytes(int64_t tiles) { return static_cast<int>(16 + 4 * tiles); }

inline HeadLaunch join_launch(const HeadTopK& op) {
  return {static_cast<int>(op.num_rows), join_bytes(tiles_of(op))};
}

inline const char* head_obstacle(const HeadTopK& op) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  if (op.features < 8 || op.features % 8 != 0) return "takes features in multiples of 8";
  if (!aligned(op.x) || !aligned(op.weight) || op.x_stride % 8 != 0) {
    return "takes rows that begin at multiples of 16 bytes";
  }
  if (op.count < 1 || op.count > HeadTopK::kMaxCount || op.count > op.classes) {
    return "takes counts from 1 to 32, and at most as many as there are classes";
  }
  if (tiles_of(op) > kMostTiles) return "takes at most 2^21 classes";
  if (op.num_rows * tiles_of(op) > INT_MAX) return "takes at most 2^31 - 1 tiles";
  return nullptr;
}

// run(T{}, std::integral_constant<int, rows of a tile>{}).
template <class Run>
auto with_head_types(const HeadTopK& op, Run run) {
  using Few = std::integral_constant<int, 16>;
  using Many = std::integral_constant<int, 48>;
  if (op.element == HeadTopK::Element::kFloat16) {
    return op.num_rows <= Few::value ? run(Float16{}, Few{}) : run(Float16{}, Many{});
  }
  return op.num_rows <= Few::value ? run(BFloat16{}, Few{}) : run(BFloat16{}, Many{});
}

}  // namespace beit3_fast::cuda
