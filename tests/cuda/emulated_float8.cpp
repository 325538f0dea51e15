// The kernels of products in 8 bits on the CPU, for Python's ctypes.

#include "float8_linear.cuh"
#include "portable_float8.cuh"
#include "quantize_rows.cuh"

namespace {

using namespace beit3_fast;
using namespace beit3_fast::cuda;

template <int kBands>
const char* run_hopper(const Float8Linear& op, int processors, emulated::Order order,
                       uint64_t seed) {
  using Shape = Float8Shape<kBands>;
  LinearMaps maps;
  const char* obstacle = make_tensor_map(maps.x, rows_of_float8_x(op, kBands));
  if (obstacle == nullptr) obstacle = make_tensor_map(maps.weights, rows_of_float8_weights(op));
  if (obstacle != nullptr) return obstacle;
  const int blocks = std::min(tile_count(op, kBands), processors);
  emulated::run({blocks, Shape::kThreads, Shape::kBytes, order, seed},
                [&] { multiply_float8<kBands>(maps, op); });
  return nullptr;
}

const char* run_portable(const Float8Linear& op, emulated::Order order, uint64_t seed) {
  using Shape = PortableFloat8Shape;
  emulated::run({tile_count(op, Shape::kBands), Shape::kThreads, Shape::kBytes, order, seed},
                [&] { multiply_float8_portable(op); });
  return nullptr;
}

template <class Run>
const char* fault_of(Run run) {
  static std::string fault;
  try {
    return run();
  } catch (const std::exception& error) {
    fault = error.what();
    return fault.c_str();
  }
}

}  // namespace

// As float8_linear: in tiles of one or two bands on so many multiprocessors of compute capability
// 9.0, or with no bands by the portable kernel. Returns the fault, or null.
extern "C" const char* emulate_float8_linear(const Float8Linear* op, int bands, int processors,
                                             int order, uint64_t seed) {
  return fault_of([&]() -> const char* {
    const auto when = static_cast<emulated::Order>(order);
    const char* obstacle = float8_obstacle(*op);
    if (obstacle != nullptr || tile_count(*op, 1) == 0) return obstacle;
    if (bands == 0) return run_portable(*op, when, seed);
    return (bands == 1 ? run_hopper<1> : run_hopper<2>)(*op, processors, when, seed);
  });
}

// As quantize_rows, on `blocks` thread blocks.
extern "C" const char* emulate_quantize_rows(const QuantizeRows* op, int blocks, int order,
                                             uint64_t seed) {
  return fault_of([&]() -> const char* {
    if (const char* obstacle = rows_obstacle(*op)) return obstacle;
    const emulated::Launch launch{blocks, 32 * kQuantizeWarps, 0,
                                  static_cast<emulated::Order>(order), seed};
    emulated::run(launch, [&] { quantize(*op); });
    return nullptr;
  });
}
