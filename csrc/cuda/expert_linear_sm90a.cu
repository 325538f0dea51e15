#include "expert_linear.cuh"

#include <cuda_runtime.h>

#include <algorithm>

namespace beit3_fast::cuda {
inline namespace linear_launcher {

using LinearKernel = void (*)(const LinearMaps, const ExpertLinear);

LinearKernel kernel_for(const ExpertLinear& op) {
  const bool gathered = op.rows != nullptr;
  if (op.element == ExpertLinear::Element::kBFloat16) {
    return gathered ? multiply_experts<BFloat16, true> : multiply_experts<BFloat16, false>;
  }
  return gathered ? multiply_experts<Float16, true> : multiply_experts<Float16, false>;
}

const char* name_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace linear_launcher

const char* expert_linear_obstacle(const ExpertLinear& op) { return linear_obstacle(op); }

const char* expert_linear(const ExpertLinear& op, CUstream_st* stream) {
  const char* obstacle = linear_obstacle(op);
  if (obstacle != nullptr) return obstacle;
  const int tiles = tile_count(op);
  if (tiles == 0) return nullptr;
  LinearMaps maps{};
  if (op.rows == nullptr) obstacle = make_tensor_map(maps.x, rows_of_x(op));
  if (obstacle == nullptr) obstacle = make_tensor_map(maps.weights, rows_of_weights(op));
  if (obstacle != nullptr) return obstacle;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  const LinearKernel kernel = kernel_for(op);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 LinearShape::kBytes);
  }
  if (error != cudaSuccess) return name_of(error);
  kernel<<<std::min(tiles, processors), LinearShape::kThreads, LinearShape::kBytes, stream>>>(maps,
                                                                                              op);
  return name_of(cudaGetLastError());
}

}  // namespace beit3_fast::cuda
