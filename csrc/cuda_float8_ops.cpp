// The CUDA kernels of products in 8 bits on LibTorch's stable ABI, as cuda_ops.cpp has the others.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cuda/float8_linear.h"
#include "cuda_operands.h"

namespace {

using namespace beit3_fast::operands;
using beit3_fast::cuda::Float8Linear;
using beit3_fast::cuda::QuantizeRows;

int64_t blocks_of(int64_t columns) {
  return (columns + Float8Linear::kBlock - 1) / Float8Linear::kBlock;
}

void* rounded_of(const Tensor& t, const Tensor& first, int64_t count, const char* op,
                 const char* name) {
  return numbers_of<uint8_t>(t, first, ScalarType::Float8_e4m3fn, count, op, name);
}

void require_bfloat16(const Tensor& t, const Tensor& first, int64_t rows, int64_t columns,
                      const char* op, const char* name) {
  require(on_device(t) && t.get_device_index() == first.get_device_index() &&
              t.scalar_type() == ScalarType::BFloat16,
          op, ": ", name, " must be bfloat16, on the device of the first argument, a GPU");
  require_matrix(t, op, name);
  require(t.size(0) == rows && t.size(1) == columns, op, ": ", name, " must have shape [", rows,
          ", ", columns, "], got ", shape_of(t));
}

void quantize_rows(Tensor x, Tensor rounded, Tensor scales, std::optional<Tensor> parts,
                   int64_t stream) {
  constexpr const char* op = "launch_quantize_rows";
  require(x.dim() == 2, op, ": x must be a matrix, got ", shape_of(x));
  const int64_t count = x.size(0), columns = x.size(1), blocks = count * blocks_of(columns);
  require_bfloat16(x, x, count, columns, op, "x");
  QuantizeRows call;
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.rounded = rounded_of(rounded, x, count * columns, op, "rounded");
  call.scales = numbers_of<float>(scales, x, ScalarType::Float, blocks, op, "scales");
  if (parts.has_value()) {
    call.parts = numbers_of<float>(*parts, x, ScalarType::Float, 2 * blocks, op, "parts");
  }
  call.num_rows = count;
  call.features = columns;
  raise(op, beit3_fast::cuda::quantize_rows_obstacle(call));
  const DeviceGuard guard(x);
  raise(op, beit3_fast::cuda::quantize_rows(call, stream_of(stream)));
}

void float8_linear(Tensor x, Tensor x_scales, Tensor weights, Tensor weight_scales,
                   std::optional<Tensor> sums, std::optional<Tensor> biases,
                   std::optional<Tensor> parts, int64_t part_width, double eps,
                   std::optional<Tensor> residual, std::vector<int64_t> bounds, bool gelu,
                   std::optional<Tensor> y, std::optional<Tensor> y_parts,
                   std::optional<Tensor> rounded, std::optional<Tensor> rounded_scales,
                   int64_t stream) {
  constexpr const char* op = "launch_float8_linear";
  require(x.dim() == 2 && weights.dim() == 3, op,
          ": x must be a matrix and weights [E, N, K], got ", shape_of(x), " and ",
          shape_of(weights));
  const int64_t count = x.size(0), in = x.size(1), out = weights.size(1);
  const auto experts = static_cast<int64_t>(bounds.size()) - 1;
  require(experts >= 1 && experts <= Float8Linear::kMaxExperts, op, ": takes 1 to ",
          Float8Linear::kMaxExperts, " experts, got ", experts);
  require(weights.size(0) == experts && weights.size(2) == in, op, ": weights must be [", experts,
          ", ", out, ", ", in, "], got ", shape_of(weights));
  const auto floats = [&](const std::optional<Tensor>& t, int64_t size, const char* name) {
    return t.has_value() ? numbers_of<float>(*t, x, ScalarType::Float, size, op, name) : nullptr;
  };
  Float8Linear call;
  call.gelu = gelu;
  call.x = rounded_of(x, x, count * in, op, "x");
  call.x_scales = floats(x_scales, count * blocks_of(in), "x_scales");
  call.weights = rounded_of(weights, x, experts * out * in, op, "weights");
  call.weight_scales = floats(weight_scales, experts * out, "weight_scales");
  call.sums = floats(sums, experts * out, "sums");
  call.biases = floats(biases, experts * out, "biases");
  take_moments(call, x, count, in, sums.has_value(), parts, part_width, op);
  call.eps = static_cast<float>(eps);
  if (residual.has_value()) {
    require_bfloat16(*residual, x, count, out, op, "residual");
    call.residual = residual->const_data_ptr();
    call.residual_stride = residual->stride(0);
  }
  if (y.has_value()) {
    require_bfloat16(*y, x, count, out, op, "y");
    call.y = y->mutable_data_ptr();
    call.y_stride = y->stride(0);
  }
  call.y_parts = floats(y_parts, count * blocks_of(out) * 2, "y_parts");
  if (rounded.has_value()) call.rounded = rounded_of(*rounded, x, count * out, op, "rounded");
  call.rounded_scales = floats(rounded_scales, count * blocks_of(out), "rounded_scales");
  call.num_rows = count;
  call.in_features = in;
  call.out_features = out;
  call.num_experts = experts;
  take_bounds(call, bounds, op);
  require(bounds.back() <= count, op, ": bounds end at ", bounds.back(), ", but x has ", count,
          " rows");
  raise(op, beit3_fast::cuda::float8_linear_obstacle(call));
  const DeviceGuard guard(x);
  raise(op, beit3_fast::cuda::float8_linear(call, stream_of(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(BEIT3_FAST_NAMESPACE, m) {
  m.def(
      "launch_quantize_rows(Tensor x, Tensor(a!) rounded, Tensor(b!) scales, Tensor(c!)? parts, "
      "int stream) -> ()");
  m.def(
      "launch_float8_linear(Tensor x, Tensor x_scales, Tensor weights, Tensor weight_scales, "
      "Tensor? sums, Tensor? biases, Tensor? parts, int part_width, float eps, Tensor? residual, "
      "int[] bounds, bool gelu, Tensor(a!)? y, Tensor(b!)? y_parts, Tensor(c!)? rounded, "
      "Tensor(d!)? rounded_scales, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(BEIT3_FAST_NAMESPACE, BEIT3_FAST_DEVICE, m) {
  m.impl("launch_quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("launch_float8_linear", TORCH_BOX(&float8_linear));
}
