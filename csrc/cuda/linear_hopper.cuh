// Which of the Hopper kernels takes a product, by its plan.
#pragma once

#include <algorithm>
#include <type_traits>

#include "expert_linear.cuh"
#include "split_k_linear.cuh"

namespace beit3_fast::cuda {

struct LinearLaunch {
  int blocks;
  int threads;
  int shared_bytes;
  int cluster;  // blocks of a cluster
  LinearMaps maps;
};

// launch(kernel, LinearLaunch) for the kernel of a plan, on at most so many clusters at once.
// Returns what it returns, or why the operands have no maps.
template <class Launch>
const char* with_linear_kernel(const ExpertLinear& op, const LinearPlan& plan, int clusters,
                               Launch launch) {
  const auto with = [&](auto shape, int tiles, auto* brain, auto* half) -> const char* {
    using Shape = decltype(shape);
    LinearLaunch own{tiles * Shape::kBlocks, Shape::kThreads, Shape::kBytes, Shape::kBlocks, {}};
    const int bands = LinearTiles<Shape>::kBands;
    if (const char* obstacle = make_maps(own.maps, op, bands, Shape::kHigh, Shape::kWide)) {
      return obstacle;
    }
    return launch(op.element == ExpertLinear::Element::kBFloat16 ? brain : half, own);
  };
  const auto tiles = [&](auto shape, auto gathered) {
    using Shape = decltype(shape);
    constexpr int kBands = LinearTiles<Shape>::kBands;
    constexpr bool kGathered = decltype(gathered)::value;
    const int count = tile_count(op, kBands * Shape::kHigh, Shape::kWide);
    return with(shape, std::min(count, clusters),
                multiply_experts<BFloat16, kBands, kGathered, Shape::kHigh, Shape::kWide>,
                multiply_experts<Float16, kBands, kGathered, Shape::kHigh, Shape::kWide>);
  };
  const auto shares = [&](auto shape, auto gathered) {
    constexpr int kShares = decltype(shape)::kShares;
    constexpr bool kGathered = decltype(gathered)::value;
    return with(shape, tile_count(op, 1), multiply_experts_split_k<BFloat16, kGathered, kShares>,
                multiply_experts_split_k<Float16, kGathered, kShares>);
  };
  const auto by_plan = [&](auto gathered) {
    if (plan.shares == 4) return shares(SplitKShape<4>{}, gathered);
    if (plan.shares == 2) return shares(SplitKShape<2>{}, gathered);
    if (plan.bands == 1) return tiles(LinearShape<1>{}, gathered);
    if (plan.high == 1) return tiles(LinearShape<2>{}, gathered);
    if constexpr (!decltype(gathered)::value) {
      if (plan.wide == 2) return tiles(LinearShape<2, 2, 2>{}, gathered);
    }
    return tiles(LinearShape<2, 2>{}, gathered);
  };
  return op.rows == nullptr ? by_plan(std::false_type{}) : by_plan(std::true_type{});
}

}  // namespace beit3_fast::cuda
