// expert_linear.cuh on the CPU, for Python's ctypes.

#include "expert_linear.cuh"

namespace {

using namespace beit3_fast;
using namespace beit3_fast::cuda;

template <class T>
void run_grid(const emulated::Launch& launch, const LinearMaps& maps, const ExpertLinear& op) {
  emulated::run(launch, [&] {
    if (op.rows == nullptr) {
      multiply_experts<T, false>(maps, op);
    } else {
      multiply_experts<T, true>(maps, op);
    }
  });
}

}  // namespace

// As expert_linear, on `processors` multiprocessors. Returns the fault, or null.
extern "C" const char* emulate_expert_linear(const ExpertLinear* op, int processors, int order,
                                             uint64_t seed) {
  static std::string fault;
  try {
    const char* obstacle = linear_obstacle(*op);
    const int tiles = tile_count(*op);
    LinearMaps maps;
    if (obstacle == nullptr && op->rows == nullptr && tiles > 0) {
      obstacle = make_tensor_map(maps.x, rows_of_x(*op));
    }
    if (obstacle == nullptr) obstacle = make_tensor_map(maps.weights, rows_of_weights(*op));
    if (obstacle != nullptr || tiles == 0) return obstacle;
    const emulated::Launch launch{std::min(tiles, processors), LinearShape::kThreads,
                                  LinearShape::kBytes, static_cast<emulated::Order>(order), seed};
    const bool bfloat16 = op->element == ExpertLinear::Element::kBFloat16;
    (bfloat16 ? run_grid<BFloat16> : run_grid<Float16>)(launch, maps, *op);
    return nullptr;
  } catch (const std::exception& error) {
    fault = error.what();
    return fault.c_str();
  }
}
