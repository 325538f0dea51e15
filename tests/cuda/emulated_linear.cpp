// The kernels of expert_linear on the CPU, for Python's ctypes.

#include "expert_linear.cuh"
#include "portable_linear.cuh"

namespace {

using namespace beit3_fast;
using namespace beit3_fast::cuda;

template <int kBands, int kCluster>
const char* run_hopper(const ExpertLinear& op, int processors, emulated::Order order,
                       uint64_t seed) {
  using Shape = LinearShape<kBands, kCluster>;
  LinearMaps maps;
  const char* obstacle = nullptr;
  if (op.rows == nullptr) obstacle = make_tensor_map(maps.x, rows_of_x(op, kBands));
  if (obstacle == nullptr) obstacle = make_tensor_map(maps.weights, rows_of_weights(op, kCluster));
  if (obstacle != nullptr) return obstacle;
  const int clusters = std::min(tile_count(op, kBands * kCluster), processors);
  const bool bfloat16 = op.element == ExpertLinear::Element::kBFloat16;
  const auto of = [&](auto* brain, auto* half) { return bfloat16 ? brain : half; };
  const auto kernel = op.rows != nullptr ? of(multiply_experts<BFloat16, kBands, true, kCluster>,
                                              multiply_experts<Float16, kBands, true, kCluster>)
                                         : of(multiply_experts<BFloat16, kBands, false, kCluster>,
                                              multiply_experts<Float16, kBands, false, kCluster>);
  emulated::run({clusters * kCluster, Shape::kThreads, Shape::kBytes, order, seed, kCluster},
                [&] { kernel(maps, op); });
  return nullptr;
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

// As expert_linear: in tiles of one or two bands by so many clusters of compute capability 9.0, of
// one block each or, with four bands, of two with two each; or with no bands by the portable
// kernel. Returns the fault, or null.
extern "C" const char* emulate_expert_linear(const ExpertLinear* op, int bands, int clusters,
                                             int order, uint64_t seed) {
  static std::string fault;
  const auto when = static_cast<emulated::Order>(order);
  try {
    const char* obstacle = linear_obstacle(*op);
    if (obstacle != nullptr || tile_count(*op, 1) == 0) return obstacle;
    if (bands == 0) return run_portable(*op, when, seed);
    const auto run = bands == 1   ? run_hopper<1, 1>
                     : bands == 2 ? run_hopper<2, 1>
                                  : run_hopper<2, kClusterBlocks>;
    return run(*op, clusters, when, seed);
  } catch (const std::exception& error) {
    fault = error.what();
    return fault.c_str();
  }
}

// Of a cluster's tiles.
extern "C" int expert_linear_bands(const ExpertLinear* op, int processors) {
  const int bands = bands_for(*op, processors);
  return bands * cluster_for(*op, bands, processors);
}
