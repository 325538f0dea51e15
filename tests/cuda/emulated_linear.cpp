// The kernels of expert_linear on the CPU, for Python's ctypes.

#include "expert_linear.cuh"
#include "portable_linear.cuh"
#include "split_k_linear.cuh"

namespace {

using namespace beit3_fast;
using namespace beit3_fast::cuda;

template <class Kernel>
Kernel* instance_for(const ExpertLinear& op, Kernel* brain, Kernel* half) {
  return op.element == ExpertLinear::Element::kBFloat16 ? brain : half;
}

template <int kBands, bool kGathered, int kHigh, int kWide>
const char* run_tiles(const ExpertLinear& op, int clusters, emulated::Order order, uint64_t seed) {
  using Shape = LinearShape<kBands, kHigh, kWide>;
  LinearMaps maps;
  if (const char* obstacle = make_maps(maps, op, kBands, kHigh, kWide)) return obstacle;
  const int blocks = std::min(tile_count(op, kBands * kHigh, kWide), clusters) * Shape::kBlocks;
  const auto kernel = instance_for(op, multiply_experts<BFloat16, kBands, kGathered, kHigh, kWide>,
                                   multiply_experts<Float16, kBands, kGathered, kHigh, kWide>);
  emulated::run({blocks, Shape::kThreads, Shape::kBytes, order, seed, Shape::kBlocks},
                [&] { kernel(maps, op); });
  return nullptr;
}

template <bool kGathered, int kShares>
const char* run_shares(const ExpertLinear& op, int, emulated::Order order, uint64_t seed) {
  using Shape = SplitKShape<kShares>;
  LinearMaps maps;
  if (const char* obstacle = make_maps(maps, op, 1, 1, 1)) return obstacle;
  const int blocks = tile_count(op, 1) * kShares;
  const auto kernel = instance_for(op, multiply_experts_split_k<BFloat16, kGathered, kShares>,
                                   multiply_experts_split_k<Float16, kGathered, kShares>);
  emulated::run({blocks, Shape::kThreads, Shape::kBytes, order, seed, kShares},
                [&] { kernel(maps, op); });
  return nullptr;
}

template <bool kGathered>
const char* run_plan(const ExpertLinear& op, const LinearPlan& plan, int clusters,
                     emulated::Order order, uint64_t seed) {
  const auto run = plan.shares == 4   ? run_shares<kGathered, 4>
                   : plan.shares == 2 ? run_shares<kGathered, 2>
                   : plan.bands == 1  ? run_tiles<1, kGathered, 1, 1>
                   : plan.high == 1   ? run_tiles<2, kGathered, 1, 1>
                   : plan.wide == 1   ? run_tiles<2, kGathered, 2, 1>
                                      : run_tiles<2, false, 2, 2>;
  return run(op, clusters, order, seed);
}

const char* run_portable(const ExpertLinear& op, emulated::Order order, uint64_t seed) {
  using Shape = PortableLinearShape;
  const auto kernel =
      instance_for(op, multiply_experts_portable<BFloat16>, multiply_experts_portable<Float16>);
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
    const auto run = op->rows == nullptr ? run_plan<false> : run_plan<true>;
    return run(*op, *plan, clusters, when, seed);
  } catch (const std::exception& error) {
    fault = error.what();
    return fault.c_str();
  }
}

extern "C" void expert_linear_plan(const ExpertLinear* op, int processors, LinearPlan* plan) {
  *plan = plan_for(*op, processors);
}
