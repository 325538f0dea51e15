// Checks operands of expert_linear and launches the kernel of the device's architecture.

#include <cuda_runtime.h>

#include "expert_linear_launch.h"
#include "portable_linear.cuh"

namespace beit3_fast::cuda {

const char* expert_linear_obstacle(const ExpertLinear& op) { return linear_obstacle(op); }

const char* expert_linear(const ExpertLinear& op, CUstream_st* stream) {
  if (const char* obstacle = linear_obstacle(op)) return obstacle;
  const int tiles = tile_count(op, PortableLinearShape::kBands);
  if (tiles == 0) return nullptr;
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
  if (hopper && launch_hopper_linear != nullptr)
    return launch_hopper_linear(op, processors, stream);
  const bool bfloat16 = op.element == ExpertLinear::Element::kBFloat16;
  const auto kernel =
      bfloat16 ? multiply_experts_portable<BFloat16> : multiply_experts_portable<Float16>;
  return enqueue_linear<PortableLinearShape>(kernel, tiles, stream, op);
}

}  // namespace beit3_fast::cuda
