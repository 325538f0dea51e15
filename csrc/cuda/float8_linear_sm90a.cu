// Launches the kernel of products in 8 bits for compute capability 9.0.

#include <algorithm>

#include "float8_linear.cuh"
#include "launch.h"

namespace beit3_fast::cuda {

template <int kBands>
const char* launch_float8_in_bands(const Float8Linear& op, int processors, CUstream_st* stream) {
  LinearMaps maps{};
  const char* obstacle = make_tensor_map(maps.x, rows_of_float8_x(op, kBands));
  if (obstacle == nullptr) obstacle = make_tensor_map(maps.weights, rows_of_float8_weights(op));
  if (obstacle != nullptr) return obstacle;
  using Shape = Float8Shape<kBands>;
  const int blocks = std::min(tile_count(op, kBands), processors);
  return enqueue(multiply_float8<kBands>, {blocks, Shape::kThreads, Shape::kBytes}, stream, maps,
                 op);
}

const char* launch_hopper_float8(const Float8Linear& op, int processors, CUstream_st* stream) {
  const auto launch =
      bands_for(op, processors) == 1 ? launch_float8_in_bands<1> : launch_float8_in_bands<2>;
  return launch(op, processors, stream);
}

}  // namespace beit3_fast::cuda
