// The CUDA kernels on LibTorch's stable ABI, see ops.cpp: checks arguments and hands raw pointers
// to cuda/. The caller names the stream: torch's own way to ask for it is in no library of a CPU
// torch and, before 2.13, in none that this one may be linked to.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cuda/row_statistics.h"
#include "operands.h"

namespace {

using namespace beit3_fast::operands;
namespace cuda = beit3_fast::cuda;

CUstream_st* stream_of(int64_t handle) { return reinterpret_cast<CUstream_st*>(handle); }

void row_statistics(Tensor x, std::optional<Tensor> rows, Tensor parts, int64_t stream) {
  constexpr const char* op = "cuda_row_statistics";
  (void)op;
  cuda::RowStatistics call;
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.rows = rows.has_value() ? static_cast<const int64_t*>(rows->const_data_ptr()) : nullptr;
  call.parts = static_cast<float*>(parts.mutable_data_ptr());
  call.num_rows = rows.has_value() ? rows->size(0) : x.size(0);
  call.features = x.size(1);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const char* error = cuda::row_statistics(call, stream_of(stream));
  require(error == nullptr, op, ": ", error);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(beit3_fast, m) {
  m.def("launch_row_statistics(Tensor x, Tensor? rows, Tensor(a!) parts, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(beit3_fast, CUDA, m) {
  m.impl("launch_row_statistics", TORCH_BOX(&row_statistics));
}
