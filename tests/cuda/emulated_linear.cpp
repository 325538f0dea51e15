// The kernels of expert_linear on the CPU, for Python's ctypes.

#include "expert_linear.cuh"
#include "portable_linear.cuh"

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

template <class T>
void run_portable(const emulated::Launch& launch, const ExpertLinear& op) {
  emulated::run(launch, [&] { multiply_experts_portable<T>(op); });
}

}  // namespace

// As expert_linear, on `processors` multiprocessors of compute capability 9.0, or on any other by
// the portable kernel. Returns the fault, or null.
extern "C" const char* emulate_expert_linear(const ExpertLinear* op, bool portable, int processors,
                                             int order, uint64_t seed) {
  static std::string fault;
  const bool bfloat16 = op->element == ExpertLinear::Element::kBFloat16;
  const auto when = static_cast<emulated::Order>(order);
  try {
    const char* obstacle = linear_obstacle(*op);
    const int tiles = tile_count(*op);
    if (obstacle != nullptr || tiles == 0) return obstacle;
    if (portable) {
      using Shape = PortableLinearShape;
      (bfloat16 ? run_portable<BFloat16>
                : run_portable<Float16>)({tiles, Shape::kThreads, Shape::kBytes, when, seed}, *op);
      return nullptr;
    }
    LinearMaps maps;
    if (op->rows == nullptr) obstacle = make_tensor_map(maps.x, rows_of_x(*op));
    if (obstacle == nullptr) obstacle = make_tensor_map(maps.weights, rows_of_weights(*op));
    if (obstacle != nullptr) return obstacle;
    (bfloat16 ? run_grid<BFloat16> : run_grid<Float16>)({std::min(tiles, processors),
                                                         LinearShape::kThreads, LinearShape::kBytes,
                                                         when, seed},
                                                        maps, *op);
    return nullptr;
  } catch (const std::exception& error) {
    fault = error.what();
    return fault.c_str();
  }
}
