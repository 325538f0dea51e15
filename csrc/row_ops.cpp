// What happens to rows behind the layers, on LibTorch's stable ABI, see ops.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "cpu/rows.h"
#include "norm_operands.h"
#include "passing_rows.h"

namespace {

using beit3_fast::cpu::LayerNormGradients;
using beit3_fast::cpu::Transposition;
using beit3_fast::cpu::UnpackRows;
using namespace beit3_fast::operands;

Tensor expert_layer_norm(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                         std::vector<double> eps, std::vector<int64_t> bounds) {
  constexpr const char* op = "expert_layer_norm";
  dtype_of(x, op, "x");
  require_matrix(x, op, "x");
  require(x.size(1) > 0, op, ": x must have columns, got shape ", shape_of(x));
  return layer_norm(x, norm_experts(x, x.size(0), {weights, biases, eps, bounds}, op), op);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_gradients(Tensor grad, Tensor x, Tensor weight,
                                                        double eps) {
  constexpr const char* op = "layer_norm_gradients";
  LayerNormGradients call;
  call.dtype = dtype_of(x, op, "x");
  require_matrix(x, op, "x");
  require(x.size(1) > 0, op, ": x must have columns, got shape ", shape_of(x));
  require_same_type(grad, x, op, "grad");
  require_matrix(grad, op, "grad");
  require(grad.size(0) == x.size(0) && grad.size(1) == x.size(1), op,
          ": grad must have the shape of x, got ", shape_of(grad));
  call.weight = parameter_of(weight, x.size(1), op, "weight");
  call.eps = eps_of(eps, op);
  call.rows = x.size(0);
  call.width = x.size(1);
  Tensor x_grad = rows_like(x, call.rows, call.width);
  Tensor weight_grad = torch::stable::new_empty(weight, {&call.width, 1});
  Tensor bias_grad = torch::stable::new_empty(weight, {&call.width, 1});
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.grad = grad.const_data_ptr();
  call.grad_stride = grad.stride(0);
  call.x_grad = x_grad.mutable_data_ptr();
  call.weight_grad = weight_grad.mutable_data_ptr();
  call.bias_grad = bias_grad.mutable_data_ptr();
  beit3_fast::cpu::layer_norm_gradients(torch_pool(), call);
  return {x_grad, weight_grad, bias_grad};
}

Tensor transposed(Tensor x) {
  constexpr const char* op = "transposed";
  Transposition call;
  call.dtype = dtype_of(x, op, "x");
  require_matrix(x, op, "x");
  call.rows = x.size(0);
  call.columns = x.size(1);
  Tensor out = rows_like(x, call.columns, call.rows);
  if (x.numel() == 0) return out;
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.out = out.mutable_data_ptr();
  beit3_fast::cpu::transpose(torch_pool(), call);
  return out;
}

Tensor unpack_rows(Tensor x, Tensor places, int64_t count) {
  constexpr const char* op = "unpack_rows";
  require(x.is_cpu(), op, ": x must be a CPU tensor");
  require_matrix(x, op, "x");
  UnpackRows call;
  call.rows = x.size(0);
  call.count = count;
  require(count >= 0, op, ": count must not be negative, got ", count);
  require(places.is_cpu() && places.scalar_type() == ScalarType::Long && places.dim() == 1 &&
              places.is_contiguous() && places.size(0) == call.rows,
          op, ": places must be a contiguous int64 CPU tensor [", call.rows, "], got shape ",
          shape_of(places));
  call.places = static_cast<const int64_t*>(places.const_data_ptr());
  for (int64_t r = 0; r < call.rows; ++r) {
    require(call.places[r] >= 0 && call.places[r] < count, op, ": places[", r, "] is ",
            call.places[r], ", outside the ", count, " rows of the result");
  }
  Tensor out = rows_like(x, count, x.size(1));
  const auto size = static_cast<int64_t>(x.element_size());
  call.bytes = x.size(1) * size;
  if (count == 0 || call.bytes == 0) return out;
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0) * size;
  call.out = out.mutable_data_ptr();
  beit3_fast::cpu::unpack_rows(torch_pool(), call);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(beit3_fast, m) {
  m.def(
      "expert_layer_norm(Tensor x, Tensor[] weights, Tensor[] biases, float[] eps, int[] bounds) "
      "-> "
      "Tensor");
  m.def(
      "layer_norm_gradients(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, "
      "Tensor)");
  m.def("transposed(Tensor x) -> Tensor");
  m.def("unpack_rows(Tensor x, Tensor places, int count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(beit3_fast, CPU, m) {
  m.impl("expert_layer_norm", TORCH_BOX(&expert_layer_norm));
  m.impl("layer_norm_gradients", TORCH_BOX(&layer_norm_gradients));
  m.impl("transposed", TORCH_BOX(&transposed));
  m.impl("unpack_rows", TORCH_BOX(&unpack_rows));
}
