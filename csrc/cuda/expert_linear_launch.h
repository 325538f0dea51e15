// What the launchers of expert_linear share.
#pragma once

#include <cuda_runtime.h>

#include "expert_linear.h"

namespace beit3_fast::cuda {

// Null in a library that was built without sm_90a.
__attribute__((weak)) const char* launch_hopper_linear(const ExpertLinear& op, int processors,
                                                       CUstream_st* stream);

template <class Shape, class... Own>
const char* enqueue_linear(void (*kernel)(Own...), int blocks, CUstream_st* stream,
                           const Own&... args) {
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kBytes);
  if (error == cudaSuccess) {
    kernel<<<blocks, Shape::kThreads, Shape::kBytes, stream>>>(args...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace beit3_fast::cuda
