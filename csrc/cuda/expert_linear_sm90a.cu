// Launches the kernels of expert_linear for compute capability 9.0.

#include <algorithm>

#include "expert_linear.cuh"
#include "launch.h"
#include "split_k_linear.cuh"

namespace beit3_fast::cuda {

// The instance for the op's element.
template <class Kernel>
Kernel* instance_for(const ExpertLinear& op, Kernel* brain, Kernel* half) {
  return op.element == ExpertLinear::Element::kBFloat16 ? brain : half;
}

template <int kBands, bool kGathered, int kHigh, int kWide>
const char* launch_tiles(const ExpertLinear& op, int processors, CUstream_st* stream) {
  using Shape = LinearShape<kBands, kHigh, kWide>;
  LinearMaps maps{};
  if (const char* obstacle = make_maps(maps, op, kBands, kHigh, kWide)) return obstacle;
  const auto kernel = instance_for(op, multiply_experts<BFloat16, kBands, kGathered, kHigh, kWide>,
                                   multiply_experts<Float16, kBands, kGathered, kHigh, kWide>);
  const int clusters =
      std::min(tile_count(op, kBands * kHigh, kWide), clusters_at_once(processors, Shape::kBlocks));
  const Grid grid{clusters * Shape::kBlocks, Shape::kThreads, Shape::kBytes, Shape::kBlocks};
  return enqueue(kernel, grid, stream, maps, op);
}

template <bool kGathered, int kShares>
const char* launch_shares(const ExpertLinear& op, CUstream_st* stream) {
  using Shape = SplitKShape<kShares>;
  LinearMaps maps{};
  if (const char* obstacle = make_maps(maps, op, 1, 1, 1)) return obstacle;
  const auto kernel = instance_for(op, multiply_experts_split_k<BFloat16, kGathered, kShares>,
                                   multiply_experts_split_k<Float16, kGathered, kShares>);
  const Grid grid{tile_count(op, 1) * kShares, Shape::kThreads, Shape::kBytes, kShares};
  return enqueue(kernel, grid, stream, maps, op);
}

template <bool kGathered>
const char* launch_plan(const ExpertLinear& op, const LinearPlan& plan, int processors,
                        CUstream_st* stream) {
  if (plan.shares == 4) return launch_shares<kGathered, 4>(op, stream);
  if (plan.shares == 2) return launch_shares<kGathered, 2>(op, stream);
  if (plan.bands == 1) return launch_tiles<1, kGathered, 1, 1>(op, processors, stream);
  if (plan.high == 1) return launch_tiles<2, kGathered, 1, 1>(op, processors, stream);
  if constexpr (!kGathered) {
    if (plan.wide == 2) return launch_tiles<2, false, 2, 2>(op, processors, stream);
  }
  return launch_tiles<2, kGathered, 2, 1>(op, processors, stream);
}

const char* launch_hopper_linear(const ExpertLinear& op, int processors, CUstream_st* stream) {
  const LinearPlan plan = plan_for(op, processors);
  return op.rows == nullptr ? launch_plan<false>(op, plan, processors, stream)
                            : launch_plan<true>(op, plan, processors, stream);
}

}  // namespace beit3_fast::cuda
