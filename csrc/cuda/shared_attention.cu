// Checks operands of shared_attention and launches the kernel of the device's architecture.

#include "shared_attention.h"

#include <climits>

#include "attention_plan.cuh"
#include "portable_attention.cuh"
#include "shared_attention_launch.h"

namespace beit3_fast::cuda {
inline namespace attention_launcher {

// Copies move 16 bytes at a time.
bool fits(const void* data, int64_t stride, int64_t width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0 && stride >= width;
}

const char* launch_portable(const SharedAttention& op, CUstream_st* stream) {
  return with_types(op, [&](auto type, auto width) {
    constexpr int kHeadDim = decltype(width)::value;
    const AttentionLaunch launch = portable_launch<PortableShape<kHeadDim>>(op);
    return enqueue(attend_portable<decltype(type), kHeadDim>, launch, stream, launch.call);
  });
}

}  // namespace attention_launcher

const char* shared_attention_obstacle(const SharedAttention& op) {
  const int64_t width = op.num_heads * op.head_dim;
  if (op.head_dim != 64 && op.head_dim != 88) return "takes heads of 64 or 88 columns";
  if (!fits(op.q, op.q_stride, width) || !fits(op.k, op.k_stride, width) ||
      !fits(op.v, op.v_stride, width) || !fits(op.o, op.o_stride, width)) {
    return "takes rows that begin at multiples of 16 bytes and do not overlap";
  }
  if (op.num_queries > 0 && op.num_keys == 0) return "takes at least one key";
  if (op.num_queries > INT_MAX / 2 || op.num_keys > INT_MAX / 2) return "takes at most 2^30 rows";
  if (op.batch * op.num_heads * ((op.longest_queries + 63) / 64) > INT_MAX) {
    return "takes at most 2^31 - 1 query tiles";
  }
  return nullptr;
}

const char* shared_attention(const SharedAttention& op, CUstream_st* stream) {
  if (const char* obstacle = shared_attention_obstacle(op)) return obstacle;
  if (op.num_queries == 0) return nullptr;
  int device = 0;
  int capability[2] = {};
  int processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int& answer, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&answer, attribute, device);
  };
  ask(capability[0], cudaDevAttrComputeCapabilityMajor);
  ask(capability[1], cudaDevAttrComputeCapabilityMinor);
  ask(processors, cudaDevAttrMultiProcessorCount);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const bool hopper = capability[0] == 9 && capability[1] == 0;
  if (hopper && launch_hopper_attention != nullptr) {
    return launch_hopper_attention(op, processors, stream);
  }
  return launch_portable(op, stream);
}

}  // namespace beit3_fast::cuda
