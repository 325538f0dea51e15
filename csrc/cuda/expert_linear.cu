// Checks operands of expert_linear and launches the kernel of the device's architecture.

#include "expert_linear.h"
#include "launch.h"
#include "portable_linear.cuh"

namespace beit3_fast::cuda {

const char* expert_linear_obstacle(const ExpertLinear& op) { return linear_obstacle(op); }

const char* expert_linear(const ExpertLinear& op, CUstream_st* stream) {
  if (const char* obstacle = linear_obstacle(op)) return obstacle;
  const int tiles = tile_count(op, PortableLinearShape::kBands);
  if (tiles == 0) return nullptr;
  Device device;
  if (const char* error = ask(device)) return error;
  if (device.hopper && launch_hopper_linear != nullptr) {
    return launch_hopper_linear(op, device.processors, stream);
  }
  const bool bfloat16 = op.element == ExpertLinear::Element::kBFloat16;
  const auto kernel =
      bfloat16 ? multiply_experts_portable<BFloat16> : multiply_experts_portable<Float16>;
  using Shape = PortableLinearShape;
  return enqueue(kernel, {tiles, Shape::kThreads, Shape::kBytes}, stream, op);
}

}  // namespace beit3_fast::cuda
