// The CUDA kernels on LibTorch's stable ABI, see ops.cpp: checks what a kernel would trust, and
// hands raw pointers to cuda/. Results are written into tensors that the caller allocates.
//
// The caller names the stream: torch's C interface offers it in libraries that a CPU build of torch
// does not have, so that this one could not be loaded there.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "cuda/expert_linear.h"
#include "cuda/row_statistics.h"
#include "cuda/shared_attention.h"
#include "cuda_operands.h"

namespace {

using namespace beit3_fast::operands;
using beit3_fast::cuda::ExpertLinear;
using beit3_fast::cuda::RowStatistics;
using beit3_fast::cuda::SharedAttention;

void row_statistics(Tensor x, std::optional<Tensor> rows, Tensor parts, int64_t stream) {
  constexpr const char* op = "launch_row_statistics";
  require_rows(x, x, op, "x");
  RowStatistics call;
  call.element = element_of<RowStatistics>(x);
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.num_rows = x.size(0);
  call.features = x.size(1);
  if (rows.has_value()) {
    call.num_rows = rows->numel();
    call.rows = numbers_of<int64_t>(*rows, x, ScalarType::Long, rows->numel(), op, "rows");
  }
  call.parts = numbers_of<float>(parts, x, ScalarType::Float, 2 * x.size(0), op, "parts");
  const DeviceGuard guard(x);
  raise(op, beit3_fast::cuda::row_statistics(call, stream_of(stream)));
}

void expert_linear(Tensor x, Tensor weights, std::optional<Tensor> sums,
                   std::optional<Tensor> biases, std::optional<Tensor> parts, int64_t part_width,
                   double eps, std::optional<Tensor> residual, std::optional<Tensor> rows,
                   std::vector<int64_t> bounds, bool gelu, Tensor y, std::optional<Tensor> y_parts,
                   int64_t stream, int64_t most_blocks) {
  constexpr const char* op = "launch_expert_linear";
  require_rows(x, x, op, "x");
  require_rows(y, x, op, "y");
  const int64_t count = x.size(0), in = x.size(1), out = y.size(1);
  const auto experts = static_cast<int64_t>(bounds.size()) - 1;
  require(experts >= 1 && experts <= ExpertLinear::kMaxExperts, op, ": takes 1 to ",
          ExpertLinear::kMaxExperts, " experts, got ", experts);
  require(y.size(0) == count, op, ": y must have the ", count, " rows of x, got shape ",
          shape_of(y));
  require(on_device(weights) && weights.scalar_type() == x.scalar_type() && weights.dim() == 3 &&
              weights.is_contiguous() && weights.size(0) == experts && weights.size(1) == out &&
              weights.size(2) == in,
          op, ": weights must be contiguous [", experts, ", ", out, ", ", in,
          "] of the dtype and device of x, got ", shape_of(weights));
  const auto floats = [&](const std::optional<Tensor>& t, int64_t size, const char* name) {
    return t.has_value() ? numbers_of<float>(*t, x, ScalarType::Float, size, op, name) : nullptr;
  };
  ExpertLinear call;
  call.element = element_of<ExpertLinear>(x);
  call.gelu = gelu;
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.weights = weights.const_data_ptr();
  call.sums = floats(sums, experts * out, "sums");
  call.biases = floats(biases, experts * out, "biases");
  take_moments(call, x, count, in, sums.has_value(), parts, part_width, op);
  call.eps = static_cast<float>(eps);
  if (residual.has_value()) {
    require_rows(*residual, x, op, "residual");
    require(residual->size(0) == count && residual->size(1) == out, op,
            ": residual must have the shape of y, got ", shape_of(*residual));
    call.residual = residual->const_data_ptr();
    call.residual_stride = residual->stride(0);
  }
  take_bounds(call, bounds, op);
  const int64_t last = call.bounds[experts];
  if (rows.has_value()) {
    require(last <= rows->numel(), op, ": bounds end at ", last, ", behind the last of rows");
    call.rows = numbers_of<int64_t>(*rows, x, ScalarType::Long, rows->numel(), op, "rows");
  } else {
    require(last <= count, op, ": bounds end at ", last, ", but x has ", count, " rows");
  }
  call.y = y.mutable_data_ptr();
  call.y_stride = y.stride(0);
  const int64_t y_width = (out + ExpertLinear::kPartWidth - 1) / ExpertLinear::kPartWidth;
  call.y_parts = floats(y_parts, count * y_width * 2, "y_parts");
  call.num_rows = count;
  call.in_features = in;
  call.out_features = out;
  call.num_experts = experts;
  require(most_blocks == 1 || most_blocks == 2 || most_blocks == 4, op,
          ": most_blocks must be 1, 2 or 4, got ", most_blocks);
  call.most_blocks = most_blocks;
  raise(op, beit3_fast::cuda::expert_linear_obstacle(call));
  const DeviceGuard guard(x);
  raise(op, beit3_fast::cuda::expert_linear(call, stream_of(stream)));
}

SharedAttention::Mask mask_of(const std::string& name, const char* op) {
  if (name == "bidirectional") return SharedAttention::Mask::kBidirectional;
  if (name == "seq2seq") return SharedAttention::Mask::kSeq2Seq;
  require(name == "causal", op, ": mask must be 'bidirectional', 'seq2seq' or 'causal', got '",
          name, "'");
  return SharedAttention::Mask::kCausal;
}

// The result in 8 bits, and the scales of v that it goes by.
void take_float8(SharedAttention& call, const Tensor& q, const Tensor& v, int64_t width,
                 const std::optional<Tensor>& v_scales, const std::optional<Tensor>& rounded,
                 const std::optional<Tensor>& rounded_scales, const char* op) {
  const int64_t blocks = (width + SharedAttention::kBlock - 1) / SharedAttention::kBlock;
  if (v_scales.has_value()) {
    require(on_device(*v_scales) && v_scales->get_device_index() == q.get_device_index() &&
                v_scales->scalar_type() == ScalarType::Float,
            op, ": v_scales must be float32, on the device of q");
    require_matrix(*v_scales, op, "v_scales");
    require(v_scales->size(0) == v.size(0) && v_scales->size(1) == blocks, op,
            ": v_scales must have shape [", v.size(0), ", ", blocks, "], got ",
            shape_of(*v_scales));
    call.v_scales = static_cast<const float*>(v_scales->const_data_ptr());
    call.v_scales_stride = v_scales->stride(0);
  }
  if (rounded.has_value()) {
    call.rounded = numbers_of<uint8_t>(*rounded, q, ScalarType::Float8_e4m3fn, q.size(0) * width,
                                       op, "rounded");
  }
  if (rounded_scales.has_value()) {
    call.rounded_scales = numbers_of<float>(*rounded_scales, q, ScalarType::Float,
                                            q.size(0) * blocks, op, "rounded_scales");
  }
}

void shared_attention(Tensor q, Tensor k, Tensor v, Tensor cu_vision, Tensor cu_text,
                      std::optional<Tensor> cu_vision_q, std::optional<Tensor> cu_text_q,
                      std::optional<Tensor> positions_q, int64_t longest, int64_t longest_q,
                      int64_t num_heads, double scale, StringHandle mask, std::optional<Tensor> o,
                      std::optional<Tensor> lse, std::optional<Tensor> parts,
                      std::optional<Tensor> v_scales, std::optional<Tensor> rounded,
                      std::optional<Tensor> rounded_scales, int64_t stream) {
  constexpr const char* op = "launch_shared_attention";
  SharedAttention call;
  call.mask = mask_of(take(mask), op);
  require_rows(q, q, op, "q");
  require_rows(k, q, op, "k");
  require_rows(v, q, op, "v");
  if (o.has_value()) require_rows(*o, q, op, "o");
  const int64_t width = q.size(1), batch = cu_vision.numel() - 1;
  require(num_heads > 0 && width % num_heads == 0, op, ": ", num_heads,
          " heads do not divide a width of ", width);
  require(k.size(1) == width && v.size(1) == width && k.size(0) == v.size(0), op,
          ": k and v must have the same rows and the width of q, got ", shape_of(k), " and ",
          shape_of(v));
  if (o.has_value()) {
    require(o->size(0) == q.size(0) && o->size(1) == width, op,
            ": o must have the shape of q, got ", shape_of(*o));
    call.o = o->mutable_data_ptr();
    call.o_stride = o->stride(0);
  }
  require(batch >= 0, op, ": cu_vision must have B + 1 entries");
  require(std::isfinite(scale) && scale >= 0.0, op, ": scale must be finite and not negative, got ",
          scale);
  const auto offsets = [&](const Tensor& t, int64_t count, const char* name) {
    return numbers_of<int32_t>(t, q, ScalarType::Int, count, op, name);
  };
  require(cu_vision_q.has_value() == cu_text_q.has_value() &&
              cu_vision_q.has_value() == positions_q.has_value(),
          op, ": cu_vision_q, cu_text_q and positions_q come together");
  call.element = element_of<SharedAttention>(q);
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.q_stride = q.stride(0);
  call.k_stride = k.stride(0);
  call.v_stride = v.stride(0);
  const auto left_behind = [&](const std::optional<Tensor>& t, int64_t each, const char* name) {
    const int64_t count = q.size(0) * num_heads * each;
    return t.has_value() ? numbers_of<float>(*t, q, ScalarType::Float, count, op, name) : nullptr;
  };
  call.lse = left_behind(lse, 1, "lse");
  call.parts = left_behind(parts, 2, "parts");
  take_float8(call, q, v, width, v_scales, rounded, rounded_scales, op);
  call.cu_vision = call.cu_vision_q = offsets(cu_vision, batch + 1, "cu_vision");
  call.cu_text = call.cu_text_q = offsets(cu_text, batch + 1, "cu_text");
  if (positions_q.has_value()) {
    call.cu_vision_q = offsets(*cu_vision_q, batch + 1, "cu_vision_q");
    call.cu_text_q = offsets(*cu_text_q, batch + 1, "cu_text_q");
    call.positions_q = offsets(*positions_q, q.size(0), "positions_q");
  }
  call.num_queries = q.size(0);
  call.num_keys = k.size(0);
  call.batch = batch;
  call.num_heads = num_heads;
  call.head_dim = width / num_heads;
  call.longest_keys = longest;
  call.longest_queries = longest_q;
  call.scale = static_cast<float>(scale);
  raise(op, beit3_fast::cuda::shared_attention_obstacle(call));
  const DeviceGuard guard(q);
  raise(op, beit3_fast::cuda::shared_attention(call, stream_of(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(BEIT3_FAST_NAMESPACE, m) {
  m.def("launch_row_statistics(Tensor x, Tensor? rows, Tensor(a!) parts, int stream) -> ()");
  m.def(
      "launch_expert_linear(Tensor x, Tensor weights, Tensor? sums, Tensor? biases, Tensor? parts, "
      "int part_width, float eps, Tensor? residual, Tensor? rows, int[] bounds, bool gelu, "
      "Tensor(a!) y, Tensor(b!)? y_parts, int stream, int most_blocks=4) -> ()");
  m.def(
      "launch_shared_attention(Tensor q, Tensor k, Tensor v, Tensor cu_vision, Tensor cu_text, "
      "Tensor? cu_vision_q, Tensor? cu_text_q, Tensor? positions_q, int longest, int longest_q, "
      "int num_heads, float scale, str mask, Tensor(a!)? o, Tensor(b!)? lse, Tensor(c!)? "
      "parts, Tensor? v_scales, Tensor(d!)? rounded, Tensor(e!)? rounded_scales, int stream) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(BEIT3_FAST_NAMESPACE, BEIT3_FAST_DEVICE, m) {
  m.impl("launch_row_statistics", TORCH_BOX(&row_statistics));
  m.impl("launch_expert_linear", TORCH_BOX(&expert_linear));
  m.impl("launch_shared_attention", TORCH_BOX(&shared_attention));
}
