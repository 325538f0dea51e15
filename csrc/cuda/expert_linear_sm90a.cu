// Launches the kernel of expert_linear for compute capability 9.0.

#include <algorithm>

#include "expert_linear.cuh"
#include "expert_linear_launch.h"

namespace beit3_fast::cuda {

const char* launch_hopper_linear(const ExpertLinear& op, int processors, CUstream_st* stream) {
  LinearMaps maps{};
  const bool gathered = op.rows != nullptr;
  const char* obstacle = gathered ? nullptr : make_tensor_map(maps.x, rows_of_x(op));
  if (obstacle == nullptr) obstacle = make_tensor_map(maps.weights, rows_of_weights(op));
  if (obstacle != nullptr) return obstacle;
  const bool bfloat16 = op.element == ExpertLinear::Element::kBFloat16;
  const auto of = [&](auto* brain, auto* half) { return bfloat16 ? brain : half; };
  const auto kernel = gathered
                          ? of(multiply_experts<BFloat16, true>, multiply_experts<Float16, true>)
                          : of(multiply_experts<BFloat16, false>, multiply_experts<Float16, false>);
  return enqueue_linear<LinearShape>(kernel, std::min(tile_count(op), processors), stream, maps,
                                     op);
}

}  // namespace beit3_fast::cuda
