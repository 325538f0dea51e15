// Checks operands of head_top_k and launches its kernels.

#include "head_top_k.cuh"

#include "launch.h"

namespace beit3_fast::cuda {

const char* head_top_k_obstacle(const HeadTopK& op) { return head_obstacle(op); }

const char* head_top_k(const HeadTopK& op, CUstream_st* stream) {
  if (const char* obstacle = head_obstacle(op)) return obstacle;
  if (op.num_rows == 0) return nullptr;
  const char* error = with_head_types(op, [&](auto type, auto rows) {
    constexpr int kRows = decltype(rows)::value;
    const HeadLaunch launch = head_launch<kRows>(op);
    const Grid grid{launch.blocks, HeadTileShape<kRows>::kThreads, launch.shared_bytes};
    return enqueue(score_classes<decltype(type), kRows>, grid, stream, op);
  });
  if (error != nullptr) return error;
  const HeadLaunch launch = join_launch(op);
  const Grid grid{launch.blocks, 32, launch.shared_bytes, 1, join_bytes(kMostTiles)};
  return enqueue(join_classes<>, grid, stream, op);
}

}  // namespace beit3_fast::cuda
