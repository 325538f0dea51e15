// What the tensor memory accelerator is told of a tensor of 16-bit numbers.
#pragma once

#include <cstdint>

namespace beit3_fast::cuda {

// Sizes from the innermost dimension out; numbers of the innermost lie side by side. Boxes are
// stored with the 128-byte swizzle, so that their innermost size is at most 64.
struct TiledTensor {
  static constexpr int kMaxRank = 3;

  const void* data = nullptr;
  int rank = 2;
  int64_t sizes[kMaxRank] = {};
  int64_t strides[kMaxRank - 1] = {};  // bytes from one index of dimension 1, 2 to the next
  int box[kMaxRank] = {};
};

// Why the accelerator does not take such a tensor, or null.
inline const char* tiled_tensor_obstacle(const TiledTensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0)
    return "data that begin at a multiple of 16 bytes are needed";
  if (tensor.rank < 1 || tensor.rank > TiledTensor::kMaxRank)
    return "one to three dimensions are needed";
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.sizes[i] < 1 || tensor.sizes[i] > int64_t{1} << 32)
      return "sizes from 1 to 2^32 are needed";
    if (tensor.box[i] < 1 || tensor.box[i] > 256) return "boxes of 1 to 256 are needed";
  }
  if (tensor.box[0] * 2 % 16 != 0 || tensor.box[0] * 2 > 128)
    return "boxes of 16, 32 .. 128 bytes are needed";
  for (int i = 0; i + 1 < tensor.rank; ++i) {
    const int64_t stride = tensor.strides[i];
    if (stride < 0 || stride % 16 != 0 || stride >= int64_t{1} << 40)
      return "strides that are multiples of 16 bytes are needed";
  }
  return nullptr;
}

}  // namespace beit3_fast::cuda
