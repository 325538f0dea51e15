// Launches the kernel of expert_linear for compute capability 9.0.

#include <algorithm>

#include "expert_linear.cuh"
#include "launch.h"

namespace beit3_fast::cuda {

template <int kBands, int kCluster>
const char* launch_in_bands(const ExpertLinear& op, int processors, CUstream_st* stream) {
  LinearMaps maps{};
  const bool gathered = op.rows != nullptr;
  const char* obstacle = gathered ? nullptr : make_tensor_map(maps.x, rows_of_x(op, kBands));
  if (obstacle == nullptr) obstacle = make_tensor_map(maps.weights, rows_of_weights(op, kCluster));
  if (obstacle != nullptr) return obstacle;
  const bool bfloat16 = op.element == ExpertLinear::Element::kBFloat16;
  const auto of = [&](auto* brain, auto* half) { return bfloat16 ? brain : half; };
  const auto kernel = gathered ? of(multiply_experts<BFloat16, kBands, true, kCluster>,
                                    multiply_experts<Float16, kBands, true, kCluster>)
                               : of(multiply_experts<BFloat16, kBands, false, kCluster>,
                                    multiply_experts<Float16, kBands, false, kCluster>);
  const int clusters = std::min(tile_count(op, kBands * kCluster), processors / kCluster);
  using Shape = LinearShape<kBands, kCluster>;
  const Grid grid{clusters * kCluster, Shape::kThreads, Shape::kBytes, kCluster};
  return enqueue(kernel, grid, stream, maps, op);
}

const char* launch_hopper_linear(const ExpertLinear& op, int processors, CUstream_st* stream) {
  const int bands = bands_for(op, processors);
  if (bands == 1) return launch_in_bands<1, 1>(op, processors, stream);
  return cluster_for(op, bands, processors) == 1
             ? launch_in_bands<2, 1>(op, processors, stream)
             : launch_in_bands<2, kClusterBlocks>(op, processors, stream);
}

}  // namespace beit3_fast::cuda
