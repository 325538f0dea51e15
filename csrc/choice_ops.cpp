// Choosing the next words of captions, on LibTorch's stable ABI, see ops.cpp.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/likeliest.h"
#include "operands.h"

namespace {

using beit3_fast::cpu::Likeliest;
using namespace beit3_fast::operands;

std::tuple<Tensor, Tensor> likeliest(Tensor logits, std::optional<Tensor> allowed, int64_t count) {
  constexpr const char* op = "likeliest";
  Likeliest call;
  call.dtype = dtype_of(logits, op, "logits");
  require_matrix(logits, op, "logits");
  call.rows = logits.size(0);
  call.classes = logits.size(1);
  require(count >= 1 && count <= call.classes, op, ": count must be from 1 to the ", call.classes,
          " classes, got ", count);
  if (allowed.has_value()) {
    require(allowed->is_cpu() && allowed->scalar_type() == ScalarType::Bool &&
                allowed->dim() == 1 && allowed->is_contiguous() && allowed->size(0) == call.classes,
            op, ": allowed must be a contiguous bool CPU tensor [", call.classes, "], got shape ",
            shape_of(*allowed));
    call.allowed = static_cast<const unsigned char*>(allowed->const_data_ptr());
  }
  const int64_t shape[] = {call.rows, count};
  Tensor log_p = torch::stable::new_empty(logits, {shape, 2}, ScalarType::Float);
  Tensor ids = torch::stable::new_empty(logits, {shape, 2}, ScalarType::Long);
  if (call.rows == 0) return {log_p, ids};
  call.logits = logits.const_data_ptr();
  call.stride = logits.stride(0);
  call.wanted = count;
  call.log_p = static_cast<float*>(log_p.mutable_data_ptr());
  call.chosen = static_cast<int64_t*>(ids.mutable_data_ptr());
  beit3_fast::cpu::likeliest(torch_pool(), call);
  return {log_p, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(beit3_fast, m) {
  m.def("likeliest(Tensor logits, Tensor? allowed, int count) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(beit3_fast, CPU, m) { m.impl("likeliest", TORCH_BOX(&likeliest)); }
