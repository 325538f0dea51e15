// The likeliest classes of a linear head on a GPU: the launcher of the kernels in head_top_k.cuh.
#pragma once

#include <cstdint>

struct CUstream_st;  // what cudaStream_t points to

namespace beit3_fast::cuda {

// Logarithms of the softmax of x weight^T + bias at the `count` highest allowed classes of every
// row, equals in ascending order of classes. Device pointers, strides in elements.
struct HeadTopK {
  enum class Element : int32_t { kBFloat16, kFloat16 };
  static constexpr int kTileClasses = 256;
  static constexpr int kMaxCount = 32;

  Element element = Element::kBFloat16;
  const void* x = nullptr;  // [num_rows, features]
  int64_t x_stride = 0;
  const void* weight = nullptr;  // [classes, features], contiguous
  const void* bias = nullptr;    // [classes]; may be null
  // [classes]: zero for a class that is not to be named, though it counts in the softmax; null: all
  // are allowed.
  const uint8_t* allowed = nullptr;
  // What the thread blocks leave to the second kernel, for each tile of kTileClasses: fp32
  // [num_rows, tiles, 2], highest logit and sum of exponentials below it, and [num_rows, tiles,
  // count].
  float* peaks = nullptr;
  uint64_t* best = nullptr;
  float* log_p = nullptr;  // [num_rows, count]
  int64_t* ids = nullptr;  // as log_p
  int64_t num_rows = 0;
  int64_t features = 0;
  int64_t classes = 0;
  int64_t count = 0;
};

// Why the kernels do not take such operands, or null. Pointers are looked at, not followed.
const char* head_top_k_obstacle(const HeadTopK& op);

// Enqueues the two kernels (8.0 and newer) on a stream of the current device. Returns why they
// could not be launched, or null.
const char* head_top_k(const HeadTopK& op, CUstream_st* stream);

}  // namespace beit3_fast::cuda
