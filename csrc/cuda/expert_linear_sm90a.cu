// Launches the kernels of expert_linear for compute capability 9.0.

#include <algorithm>

#include "expert_linear.cuh"
#include "launch.h"
#include "split_k_linear.cuh"

namespace beit3_fast::cuda {

template <int kBands, int kCluster>
const char* launch_in_bands(const ExpertLinear& op, int processors, CUstream_st* stream) {
  LinearMaps maps{};
  if (const char* obstacle = make_maps(maps, op, kBands, kCluster)) return obstacle;
  const auto kernel = instance_for(op, multiply_experts<BFloat16, kBands, true, kCluster>,
                                   multiply_experts<Float16, kBands, true, kCluster>,
                                   multiply_experts<BFloat16, kBands, false, kCluster>,
                                   multiply_experts<Float16, kBands, false, kCluster>);
  const int clusters = std::min(tile_count(op, kBands * kCluster), processors / kCluster);
  using Shape = LinearShape<kBands, kCluster>;
  const Grid grid{clusters * kCluster, Shape::kThreads, Shape::kBytes, kCluster};
  return enqueue(kernel, grid, stream, maps, op);
}

template <int kShares>
const char* launch_in_shares(const ExpertLinear& op, CUstream_st* stream) {
  LinearMaps maps{};
  if (const char* obstacle = make_maps(maps, op, 1, 1)) return obstacle;
  const auto kernel = instance_for(op, multiply_experts_split_k<BFloat16, true, kShares>,
                                   multiply_experts_split_k<Float16, true, kShares>,
                                   multiply_experts_split_k<BFloat16, false, kShares>,
                                   multiply_experts_split_k<Float16, false, kShares>);
  using Shape = SplitKShape<kShares>;
  const Grid grid{tile_count(op, 1) * kShares, Shape::kThreads, Shape::kBytes, kShares};
  return enqueue(kernel, grid, stream, maps, op);
}

const char* launch_hopper_linear(const ExpertLinear& op, int processors, CUstream_st* stream) {
  const int bands = bands_for(op, processors), shares = shares_for(op, bands, processors);
  if (shares == 4) return launch_in_shares<4>(op, stream);
  if (shares == 2) return launch_in_shares<2>(op, stream);
  if (bands == 1) return launch_in_bands<1, 1>(op, processors, stream);
  return cluster_for(op, bands, processors) == 1
             ? launch_in_bands<2, 1>(op, processors, stream)
             : launch_in_bands<2, kClusterBlocks>(op, processors, stream);
}

}  // namespace beit3_fast::cuda
