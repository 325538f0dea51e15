// Launches the Hopper kernels of shared_attention.

#include "attention_hopper.cuh"
#include "launch.h"

namespace beit3_fast::cuda {

const char* launch_hopper_attention(const SharedAttention& op, int processors,
                                    CUstream_st* stream) {
  AttentionMaps maps;
  if (const char* obstacle = map_operands(maps, op)) return obstacle;
  return with_types(op, [&](auto type, auto width) {
    constexpr int kHeadDim = decltype(width)::value;
    return with_hopper_kernel<decltype(type), kHeadDim>(
        op, processors, [&](auto kernel, const AttentionLaunch& launch) {
          return enqueue(kernel, {launch.blocks, launch.threads, launch.shared_bytes}, stream, maps,
                         launch.call);
        });
  });
}

}  // namespace beit3_fast::cuda
