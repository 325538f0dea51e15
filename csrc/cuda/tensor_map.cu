// Tensor maps by the driver's encoder, which is looked up when it is first needed: the library
// loads on machines without a driver.

#include <cuda_runtime.h>

#include <atomic>

#include "hopper.cuh"

namespace beit3_fast::cuda {
inline namespace tensor_map_encoder {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

Encode find_encoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
  const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return usable ? reinterpret_cast<Encode>(entry) : nullptr;
}

}  // namespace tensor_map_encoder

const char* make_tensor_map(TensorMap& map, const TiledTensor& tensor) {
  // Not a static that is made once, for which a child forked meanwhile would wait.
  static std::atomic<Encode> found{nullptr};
  Encode encode = found.load(std::memory_order_relaxed);
  if (encode == nullptr) found.store(encode = find_encoder(), std::memory_order_relaxed);
  if (encode == nullptr) return "the driver has no tensor maps; 525 or newer is needed";
  const char* obstacle = tiled_tensor_obstacle(tensor);
  if (obstacle != nullptr) return obstacle;
  cuuint64_t sizes[TiledTensor::kMaxRank], strides[TiledTensor::kMaxRank];
  cuuint32_t box[TiledTensor::kMaxRank], steps[TiledTensor::kMaxRank];
  for (int i = 0; i < tensor.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(tensor.sizes[i]);
    box[i] = static_cast<cuuint32_t>(tensor.box[i]);
    steps[i] = 1;
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(tensor.strides[i - 1]);
  }
  // Of 16-bit numbers only the zeros outside matter, which are the same in every format.
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, static_cast<cuuint32_t>(tensor.rank),
             const_cast<void*>(tensor.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refused a tensor map";
}

}  // namespace beit3_fast::cuda
