// Launches the kernels of products in 8 bits for compute capability 8.9 and newer.

#include <algorithm>

#include "launch.h"
#include "portable_float8.cuh"
#include "quantize_rows.cuh"

namespace beit3_fast::cuda {

const char* launch_portable_float8(const Float8Linear& op, CUstream_st* stream) {
  using Shape = PortableFloat8Shape;
  const Grid grid{tile_count(op, Shape::kBands), Shape::kThreads, Shape::kBytes};
  return enqueue(multiply_float8_portable, grid, stream, op);
}

const char* launch_quantize_rows(const QuantizeRows& op, int processors, CUstream_st* stream) {
  constexpr int kBlocksPerProcessor = 16;
  const int64_t blocks = (op.num_rows + kQuantizeWarps - 1) / kQuantizeWarps;
  const int most = processors * kBlocksPerProcessor;
  const Grid grid{static_cast<int>(std::min<int64_t>(blocks, most)), 32 * kQuantizeWarps, 0};
  return enqueue(quantize, grid, stream, op);
}

}  // namespace beit3_fast::cuda
