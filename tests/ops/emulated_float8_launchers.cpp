// The launchers of products in 8 bits in front of the emulated kernels of tests/cuda/.

#include <cstdint>

#include "cuda/float8_linear.h"

using namespace beit3_fast::cuda;

extern "C" {
const char* emulate_float8_linear(const Float8Linear* op, int bands, int processors, int order,
                                  uint64_t seed);
const char* emulate_quantize_rows(const QuantizeRows* op, int blocks, int order, uint64_t seed);
}

namespace beit3_fast::cuda {

// The kernels are asked again where they are run.
const char* float8_linear_obstacle(const Float8Linear&) { return nullptr; }
const char* quantize_rows_obstacle(const QuantizeRows&) { return nullptr; }

const char* float8_linear(const Float8Linear& op, CUstream_st*) {
  return emulate_float8_linear(&op, 1, 3, 2, 1);
}

const char* quantize_rows(const QuantizeRows& op, CUstream_st*) {
  return emulate_quantize_rows(&op, 2, 2, 1);
}

}  // namespace beit3_fast::cuda
