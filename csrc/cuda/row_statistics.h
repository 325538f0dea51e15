// Moments of rows on a GPU: the launcher of the kernel in row_statistics.cu.
#pragma once

#include <cstdint>

struct CUstream_st;  // what cudaStream_t points to

namespace beit3_fast::cuda {

// Mean and sum of squared deviations of rows, as a LayerNorm behind them needs. Device pointers.
struct RowStatistics {
  enum class Element : int32_t { kBFloat16, kFloat16 };

  Element element = Element::kBFloat16;
  const void* x = nullptr;  // [rows of the tensor, features], the stride in elements
  int64_t x_stride = 0;
  const int64_t* rows = nullptr;  // [num_rows]: which rows of x; null: the first num_rows
  float* parts = nullptr;         // fp32 [rows of the tensor, 2], written at the named rows
  int64_t num_rows = 0;
  int64_t features = 0;
};

// Why the kernel does not take such operands, or null.
inline const char* row_statistics_obstacle(const RowStatistics& op) {
  if (op.features < 1 || op.features % 8 != 0) return "takes features in multiples of 8";
  if (reinterpret_cast<uintptr_t>(op.x) % 16 != 0 || op.x_stride % 8 != 0) {
    return "takes rows that begin at multiples of 16 bytes";
  }
  return nullptr;
}

// Enqueues the kernel on a stream of the current device. Returns why it could not be, or null.
const char* row_statistics(const RowStatistics& op, CUstream_st* stream);

}  // namespace beit3_fast::cuda
