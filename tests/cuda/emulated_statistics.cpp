// row_statistics.cuh on the CPU, for Python's ctypes.

#include "row_statistics.cuh"

// As row_statistics, on `blocks` thread blocks. Returns the fault, or null.
extern "C" const char* emulate_row_statistics(const beit3_fast::cuda::RowStatistics* op, int blocks,
                                              int order, uint64_t seed) {
  using namespace beit3_fast;
  static std::string fault;
  try {
    const emulated::Launch launch{blocks, 32 * cuda::kStatisticsWarps, 0,
                                  static_cast<emulated::Order>(order), seed};
    const bool bfloat16 = op->element == cuda::RowStatistics::Element::kBFloat16;
    emulated::run(launch, [&] {
      (bfloat16 ? cuda::moments<cuda::BFloat16> : cuda::moments<cuda::Float16>)(*op);
    });
    return nullptr;
  } catch (const std::exception& error) {
    fault = error.what();
    return fault.c_str();
  }
}
