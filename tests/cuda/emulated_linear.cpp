// The kernels of expert_linear on the CPU, for Python's ctypes.

#include "expert_linear.cuh"
#include "portable_linear.cuh"
#include "split_k_linear.cuh"

namespace {

using namespace beit3_fast;
using namespace beit3_fast::cuda;

template <int kBands, int kCluster>
const char* run_hopper(const ExpertLinear& op, int processors, emulated::Order order,
                       uint64_t seed) {
  using Shape = LinearShape<kBands, kCluster>;
  LinearMaps maps;
  if (const char* obstacle = make_maps(maps, op, kBands, kCluster)) return obstacle;
  const int clusters = std::min(tile_count(op, kBands * kCluster), processors);
  const auto kernel = instance_for(op, multiply_experts<BFloat16, kBands, true, kCluster>,
                                   multiply_experts<Float16, kBands, true, kCluster>,
                                   multiply_experts<BFloat16, kBands, false, kCluster>,
                                   multiply_experts<Float16, kBands, false, kCluster>);
  emulated::run({clusters * kCluster, Shape::kThreads, Shape::kBytes, order, seed, kCluster},
                [&] { kernel(maps, op); });
  return nullptr;
}

template <int kShares>
const char* run_split_k(const ExpertLinear& op, int, emulated::Order order, uint64_t seed) {
  using Shape = SplitKShape<kShares>;
  LinearMaps maps;
  if (const char* obstacle = make_maps(maps, op, 1, 1)) return obstacle;
  const auto kernel = instance_for(op, multiply_experts_split_k<BFloat16, true, kShares>,
                                   multiply_experts_split_k<Float16, true, kShares>,
                                   multiply_experts_split_k<BFloat16, false, kShares>,
                                   multiply_experts_split_k<Float16, false, kShares>);
  emulated::run({tile_count(op, 1) * kShares, Shape::kThreads, Shape::kBytes, order, seed, kShares},
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

// As expert_linear. By the kernel for compute capability 9.0, in tiles of one or two bands by so
// many clusters, of one block each or, with four bands, of two with two each; with no bands by the
// portable kernel. With two or four shares by as many blocks for every tile. Returns the fault, or
// null.
extern "C" const char* emulate_expert_linear(const ExpertLinear* op, int bands, int shares,
                                             int clusters, int order, uint64_t seed) {
  static std::string fault;
  const auto when = static_cast<emulated::Order>(order);
  try {
    const char* obstacle = linear_obstacle(*op);
    if (obstacle != nullptr || tile_count(*op, 1) == 0) return obstacle;
    if (bands == 0) return run_portable(*op, when, seed);
    const auto run = shares == 2   ? run_split_k<2>
                     : shares == 4 ? run_split_k<4>
                     : bands == 1  ? run_hopper<1, 1>
                     : bands == 2  ? run_hopper<2, 1>
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

// Blocks that share the depth of a tile.
extern "C" int expert_linear_shares(const ExpertLinear* op, int processors) {
  return shares_for(*op, bands_for(*op, processors), processors);
}
