// Which of the Hopper kernels takes a call of shared_attention, and what it is told of the
// operands.
#pragma once

#include "attention_plan.cuh"
#include "attention_steps.cuh"
#include "attention_whole.cuh"

namespace beit3_fast::cuda {

// launch(kernel, AttentionLaunch) for the kernel of the longest sample.
template <class T, int kHeadDim, class Launch>
auto with_hopper_kernel(const SharedAttention& op, int processors, Launch launch) {
  const auto whole = [&](auto keys) {
    constexpr int kKeys = decltype(keys)::value;
    return launch(attend_whole<T, kHeadDim, kKeys>,
                  whole_launch<WholeShape<kHeadDim, kKeys>>(op, processors));
  };
  // 197 tokens of an image are 200 keys.
  if (op.longest_keys <= 64) return whole(std::integral_constant<int, 64>{});
  if (op.longest_keys <= 128) return whole(std::integral_constant<int, 128>{});
  if (op.longest_keys <= 200) return whole(std::integral_constant<int, 200>{});
  if (op.longest_keys <= 256) return whole(std::integral_constant<int, 256>{});
  return launch(attend_in_steps<T, kHeadDim>, steps_launch<StepShape<kHeadDim>>(op, processors));
}

// Maps of the operands of a call; returns why there are none, or null.
inline const char* map_operands(AttentionMaps& maps, const SharedAttention& op) {
  const char* obstacle = nullptr;
  const auto map = [&](TensorMap& own, const void* data, int64_t stride, int64_t rows, int box) {
    if (obstacle != nullptr) return;
    // Column, head, row: what lies past a head's columns or past the last row reads as zero. The
    // stride of a single row may be any number.
    const int64_t width = op.num_heads * op.head_dim;
    obstacle = make_tensor_map(own, {data,
                                     3,
                                     {op.head_dim, op.num_heads, rows},
                                     {2 * op.head_dim, 2 * (rows > 1 ? stride : width)},
                                     {kPartColumns, 1, box}});
  };
  const auto map_rows = [&](RowMaps& own, const void* data, int64_t stride, int64_t rows) {
    map(own.rows64, data, stride, rows, 64);
    map(own.rows8, data, stride, rows, 8);
    map(own.rows1, data, stride, rows, 1);
  };
  map_rows(maps.q, op.q, op.q_stride, op.num_queries);
  map_rows(maps.k, op.k, op.k_stride, op.num_keys);
  map_rows(maps.v, op.v, op.v_stride, op.num_keys);
  return obstacle;
}

}  // namespace beit3_fast::cuda
