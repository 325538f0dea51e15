// Checks operands of products in 8 bits and launches the kernel of the device's architecture.

#include "float8_linear.h"

#include "float8_tiles.h"
#include "launch.h"

namespace beit3_fast::cuda {

// Null in a library without an architecture from 8.9 on.
__attribute__((weak)) const char* launch_portable_float8(const Float8Linear& op,
                                                         CUstream_st* stream);
__attribute__((weak)) const char* launch_quantize_rows(const QuantizeRows& op, int processors,
                                                       CUstream_st* stream);
// Null in a library without sm_90a.
__attribute__((weak)) const char* launch_hopper_float8(const Float8Linear& op, int processors,
                                                       CUstream_st* stream);

inline namespace float8_launchers {
constexpr const char* kWithout = "was built without an architecture from compute capability 8.9 on";
}

const char* float8_linear_obstacle(const Float8Linear& op) { return float8_obstacle(op); }
const char* quantize_rows_obstacle(const QuantizeRows& op) { return rows_obstacle(op); }

const char* float8_linear(const Float8Linear& op, CUstream_st* stream) {
  if (const char* obstacle = float8_obstacle(op)) return obstacle;
  if (tile_count(op, 1) == 0) return nullptr;
  Device device;
  if (const char* error = ask(device)) return error;
  if (device.hopper && launch_hopper_float8 != nullptr) {
    return launch_hopper_float8(op, device.processors, stream);
  }
  return launch_portable_float8 != nullptr ? launch_portable_float8(op, stream) : kWithout;
}

const char* quantize_rows(const QuantizeRows& op, CUstream_st* stream) {
  if (const char* obstacle = rows_obstacle(op)) return obstacle;
  if (op.num_rows == 0) return nullptr;
  Device device;
  if (const char* error = ask(device)) return error;
  if (launch_quantize_rows == nullptr) return kWithout;
  return launch_quantize_rows(op, device.processors, stream);
}

}  // namespace beit3_fast::cuda
