// What the launchers share: which device they are on, and a launch with its shared memory.
#pragma once

#include <cuda_runtime.h>

namespace beit3_fast::cuda {

struct ExpertLinear;
struct SharedAttention;

// The launchers of the kernels for compute capability 9.0; null in a library without sm_90a.
__attribute__((weak)) const char* launch_hopper_linear(const ExpertLinear& op, int processors,
                                                       CUstream_st* stream);
__attribute__((weak)) const char* launch_hopper_attention(const SharedAttention& op, int processors,
                                                          CUstream_st* stream);

struct Device {
  int processors = 0;
  bool hopper = false;
};

// Describes the current device. Returns why it cannot, or null.
inline const char* ask(Device& device) {
  int index = 0;
  int capability[2] = {};
  cudaError_t error = cudaGetDevice(&index);
  const auto attribute = [&](int& answer, cudaDeviceAttr name) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&answer, name, index);
  };
  attribute(capability[0], cudaDevAttrComputeCapabilityMajor);
  attribute(capability[1], cudaDevAttrComputeCapabilityMinor);
  attribute(device.processors, cudaDevAttrMultiProcessorCount);
  device.hopper = capability[0] == 9 && capability[1] == 0;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

struct Grid {
  int blocks;
  int threads;
  int shared_bytes;
  int cluster = 1;  // blocks of a cluster, of which the grid has whole ones
  // Of any launch of the kernel; 0: as many as of this one. What is allowed belongs to the kernel,
  // and another thread may be about to launch it.
  int most_shared_bytes = 0;
};

// Returns why the kernel could not be launched, or null.
template <class... Own, class... Args>
const char* enqueue(void (*kernel)(Own...), const Grid& grid, CUstream_st* stream,
                    const Args&... args) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  const int most = grid.most_shared_bytes > 0 ? grid.most_shared_bytes : grid.shared_bytes;
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or whoever asks next takes it for his own
  return cudaGetErrorString(error);
}

}  // namespace beit3_fast::cuda
