// What the kernels of shared_attention take, and how a call is cut into thread blocks.
#pragma once

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "attention_rows.cuh"

namespace beit3_fast::cuda {

// Copies move 16 bytes at a time.
inline bool rows_fit(const void* data, int64_t stride, int64_t rows, int64_t width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         (rows < 2 || (stride % 8 == 0 && stride >= width));
}

inline const char* attention_obstacle(const SharedAttention& op) {
  const int64_t width = op.num_heads * op.head_dim;
  if (op.head_dim != 64 && op.head_dim != 88) return "takes heads of 64 or 88 columns";
  if (!rows_fit(op.q, op.q_stride, op.num_queries, width) ||
      !rows_fit(op.k, op.k_stride, op.num_keys, width) ||
      !rows_fit(op.v, op.v_stride, op.num_keys, width) ||
      (op.o != nullptr && !rows_fit(op.o, op.o_stride, op.num_queries, width)) ||
      reinterpret_cast<uintptr_t>(op.rounded) % 16 != 0) {
    return "takes rows that begin at multiples of 16 bytes and do not overlap";
  }
  const bool rounds = op.rounded != nullptr;
  if (rounds != (op.rounded_scales != nullptr) || rounds != (op.v_scales != nullptr)) {
    return "takes scales of v and leaves numbers in 8 bits and their scales together";
  }
  if (rounds && op.element != SharedAttention::Element::kBFloat16) {
    return "rounds bfloat16 to 8 bits, no other numbers";
  }
  if (op.o == nullptr && !rounds) return "needs a place for its result";
  if (op.num_queries > 0 && op.num_keys == 0) return "takes at least one key";
  if (op.num_queries > INT_MAX / 2 || op.num_keys > INT_MAX / 2) return "takes at most 2^30 rows";
  if (op.batch * op.num_heads * ((op.longest_queries + 63) / 64) > INT_MAX) {
    return "takes at most 2^31 - 1 query tiles";
  }
  return nullptr;
}

struct AttentionLaunch {
  AttentionCall call;
  int blocks;
  int threads;
  int shared_bytes;
};

inline int64_t heads_of(const SharedAttention& op) { return op.batch * op.num_heads; }

inline AttentionCall attention_call(const SharedAttention& op, int queries_of_tile) {
  // With a scale of 0, hidden scores would become 0 * -inf. The smallest normal number makes
  // weights as equal.
  const float scale = std::max(op.scale * 1.4426950408889634f, FLT_MIN);
  const int64_t tiles = (op.longest_queries + queries_of_tile - 1) / queries_of_tile;
  return {op, scale, static_cast<int>(tiles), 1};
}

// A thread block goes through all query tiles of a head, unless that leaves processors idle: then
// the tiles are dealt out to several, each of which reads the keys again.
template <class Shape>
AttentionLaunch whole_launch(const SharedAttention& op, int processors) {
  AttentionCall call = attention_call(op, kQueries);
  const int64_t rounds = (call.tiles + Shape::kGroups - 1) / Shape::kGroups;
  const int64_t resident = int64_t{processors} * Shape::kBlocksPerProcessor;
  call.tile_steps = static_cast<int>(std::clamp<int64_t>(resident / heads_of(op), 1, rounds));
  const auto blocks = static_cast<int>(heads_of(op) * call.tile_steps);
  return {call, blocks, Shape::kThreads, Shape::kBytes};
}

template <class Shape>
AttentionLaunch steps_launch(const SharedAttention& op, int processors) {
  const AttentionCall call = attention_call(op, Shape::kTile);
  const int64_t work = heads_of(op) * call.tiles;
  return {call, static_cast<int>(std::min<int64_t>(work, processors)), Shape::kThreads,
          Shape::kBytes};
}

template <class Shape>
AttentionLaunch portable_launch(const SharedAttention& op) {
  const AttentionCall call = attention_call(op, kQueries);
  return {call, static_cast<int>(heads_of(op) * call.tiles), Shape::kThreads, Shape::kBytes};
}

// run(T{}, std::integral_constant<int, width>{}) for the call's element and width of heads.
template <class Run>
auto with_types(const SharedAttention& op, Run run) {
  using Narrow = std::integral_constant<int, 64>;
  using Wide = std::integral_constant<int, 88>;
  if (op.element == SharedAttention::Element::kFloat16) {
    return op.head_dim == Narrow::value ? run(Float16{}, Narrow{}) : run(Float16{}, Wide{});
  }
  return op.head_dim == Narrow::value ? run(BFloat16{}, Narrow{}) : run(BFloat16{}, Wide{});
}

}  // namespace beit3_fast::cuda
