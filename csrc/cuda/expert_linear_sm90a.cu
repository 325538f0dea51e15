// Launches the kernels of expert_linear for compute capability 9.0.

#include "launch.h"
#include "linear_hopper.cuh"

namespace beit3_fast::cuda {

const char* launch_hopper_linear(const ExpertLinear& op, int processors, CUstream_st* stream) {
  const LinearPlan plan = plan_for(op, processors);
  const int clusters = clusters_at_once(processors, plan.high * plan.wide);
  return with_linear_kernel(op, plan, clusters, [&](auto kernel, const LinearLaunch& own) {
    const Grid grid{own.blocks, own.threads, own.shared_bytes, own.cluster};
    return enqueue(kernel, grid, stream, own.maps, op);
  });
}

}  // namespace beit3_fast::cuda
