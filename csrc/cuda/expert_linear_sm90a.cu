// Launches the kernel of expert_linear for compute capability 9.0.

#include <algorithm>

#include "expert_linear.cuh"
#include "launch.h"

namespace beit3_fast::cuda {

template <int kBands>
const char* launch_in_bands(const ExpertLinear& op, int processors, CUstream_st* stream) {
  LinearMaps maps{};
  const bool gathered = op.rows != nullptr;
  const char* obstacle = gathered ? nullptr : make_tensor_map(maps.x, rows_of_x(op, kBands));
  if (obstacle == nullptr) obstacle = make_tensor_map(maps.weights, rows_of_weights(op));
  if (obstacle != nullptr) return obstacle;
  const bool bfloat16 = op.element == ExpertLinear::Element::kBFloat16;
  const auto of = [&](auto* brain, auto* half) { return bfloat16 ? brain : half; };
  const auto kernel =
      gathered
          ? of(multiply_experts<BFloat16, kBands, true>, multiply_experts<Float16, kBands, true>)
          : of(multiply_experts<BFloat16, kBands, false>, multiply_experts<Float16, kBands, false>);
  const int blocks = std::min(tile_count(op, kBands), processors);
  using Shape = LinearShape<kBands>;
  return enqueue(kernel, {blocks, Shape::kThreads, Shape::kBytes}, stream, maps, op);
}

const char* launch_hopper_linear(const ExpertLinear& op, int processors, CUstream_st* stream) {
  const auto launch = bands_for(op, processors) == 1 ? launch_in_bands<1> : launch_in_bands<2>;
  return launch(op, processors, stream);
}

}  // namespace beit3_fast::cuda
