// The kernels of expert_linear on the CPU, for Python's ctypes.

#include "linear_hopper.cuh"
#include "portable_linear.cuh"

namespace {

using namespace beit3_fast;
using namespace beit3_fast::cuda;

const char* run_hopper(const ExpertLinear& op, const LinearPlan& plan, int clusters,
                       emulated::Order order, uint64_t seed) {
  return with_linear_kernel(
      op, plan, clusters, [&](auto kernel, const LinearLaunch& own) -> const char* {
        emulated::run({own.blocks, own.threads, own.shared_bytes, order, seed, own.cluster},
                      [&] { kernel(own.maps, op); });
        return nullptr;
      });
}

const char* run_portable(const ExpertLinear& op, emulated::Order order, uint64_t seed) {
  using Shape = PortableLinearShape;
  const bool bfloat16 = op.element == ExpertLinear::Element::kBFloat16;
  const auto kernel =
      bfloat16 ? multiply_experts_portable<BFloat16> : multiply_experts_portable<Float16>;
  emulated::run({tile_count(op, Shape::kBands), Shape::kThreads, Shape::kBytes, order, seed},
                [&] { kernel(op); });
  return nullptr;
}

}  // namespace

// As expert_linear, by a plan and so many clusters; a plan of no bands is the portable kernel.
// Returns the fault, or null.
extern "C" const char* emulate_expert_linear(const ExpertLinear* op, const LinearPlan* plan,
                                             int clusters, int order, uint64_t seed) {
  static std::string fault;
  const auto when = static_cast<emulated::Order>(order);
  try {
    const char* obstacle = linear_obstacle(*op);
    if (obstacle != nullptr || tile_count(*op, 1) == 0) return obstacle;
    if (plan->bands == 0) return run_portable(*op, when, seed);
    return run_hopper(*op, *plan, clusters, when, seed);
  } catch (const std::exception& error) {
    fault = error.what();
    return fault.c_str();
  }
}

extern "C" void expert_linear_plan(const ExpertLinear* op, int processors, LinearPlan* plan) {
  *plan = plan_for(*op, processors);
}
