// What the launchers of shared_attention share.
#pragma once

#include <cuda_runtime.h>

#include "shared_attention.h"

namespace beit3_fast::cuda {

// Null in a library that was built without sm_90a.
__attribute__((weak)) const char* launch_hopper_attention(const SharedAttention& op, int processors,
                                                          CUstream_st* stream);

template <class Launch, class... Own, class... Args>
const char* enqueue(void (*kernel)(Own...), const Launch& launch, CUstream_st* stream,
                    const Args&... args) {
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<launch.blocks, launch.threads, launch.shared_bytes, stream>>>(args...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace beit3_fast::cuda
