// Checks operands of shared_attention and launches the kernel of the device's architecture.

#include "shared_attention.h"

#include "attention_plan.cuh"
#include "portable_attention.cuh"
#include "shared_attention_launch.h"

namespace beit3_fast::cuda {
inline namespace attention_launcher {

const char* launch_portable(const SharedAttention& op, CUstream_st* stream) {
  return with_types(op, [&](auto type, auto width) {
    constexpr int kHeadDim = decltype(width)::value;
    const AttentionLaunch launch = portable_launch<PortableShape<kHeadDim>>(op);
    return enqueue(attend_portable<decltype(type), kHeadDim>, launch, stream, launch.call);
  });
}

}  // namespace attention_launcher

const char* shared_attention_obstacle(const SharedAttention& op) { return attention_obstacle(op); }

const char* shared_attention(const SharedAttention& op, CUstream_st* stream) {
  if (const char* obstacle = attention_obstacle(op)) return obstacle;
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
