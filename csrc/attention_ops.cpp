// The attention operators on LibTorch's stable ABI, see ops.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "attention_operands.h"
#include "passing_rows.h"

namespace {

using beit3_fast::cpu::CachedAttention;
using beit3_fast::cpu::Mask;
using beit3_fast::cpu::SharedAttention;
using beit3_fast::cpu::SharedAttentionGradients;
using namespace beit3_fast::operands;

// Which keys each query sees, over the longest image's places and the longest text's behind them.
void take_seen(const Tensor& seen, SharedAttention& call) {
  int64_t longest[2] = {0, 0};
  for (int64_t s = 0; s < call.batch; ++s) {
    longest[0] = std::max<int64_t>(longest[0], call.cu_vision[s + 1] - call.cu_vision[s]);
    longest[1] = std::max<int64_t>(longest[1], call.cu_text[s + 1] - call.cu_text[s]);
  }
  const int64_t places = longest[0] + longest[1];
  require(seen.is_cpu() && seen.scalar_type() == ScalarType::Bool && seen.is_contiguous() &&
              (seen.dim() == 2 || (seen.dim() == 3 && seen.size(0) == call.batch)) &&
              seen.size(seen.dim() - 2) == places && seen.size(seen.dim() - 1) == places,
          "shared_attention: seen must be a contiguous bool CPU tensor [", places, ", ", places,
          "] or [", call.batch, ", ", places, ", ", places, "], got shape ", shape_of(seen));
  call.seen = static_cast<const unsigned char*>(seen.const_data_ptr());
  call.seen_sample = seen.dim() == 3 ? places * places : 0;
  call.seen_stride = places;
  call.seen_text = longest[0];
}

// All operands of attention; its results are the caller's.
void take_attention(const Tensor& q, const Tensor& k, const Tensor& v, const LayoutOperands& layout,
                    int64_t num_heads, double scale, StringHandle mask,
                    const std::optional<Tensor>& seen, const char* op, SharedAttention& call) {
  call.mask = mask_of(take(mask), op);
  call.dtype = dtype_of(q, op, "q");
  require_same_type(k, q, op, "k");
  require_same_type(v, q, op, "v");
  require_matrix(q, op, "q");
  require_matrix(k, op, "k");
  require_matrix(v, op, "v");
  const int64_t width = q.size(1);
  require_heads(num_heads, width, op);
  require(k.size(1) == width && v.size(1) == width && k.size(0) == v.size(0), op,
          ": k and v must have the same rows and the width ", width, " of q, got ", shape_of(k),
          " and ", shape_of(v));
  require_scale(scale, op);
  take_layout(layout, k.size(0), q.size(0), seen.has_value(), op, call);
  if (seen.has_value()) take_seen(*seen, call);
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.q_stride = q.stride(0);
  call.k_stride = k.stride(0);
  call.v_stride = v.stride(0);
  call.num_heads = num_heads;
  call.head_dim = call.q_head = call.key_head = call.out_head = width / num_heads;
  call.scale = static_cast<float>(scale);
}

Tensor shared_attention(Tensor q, Tensor k, Tensor v, Tensor cu_vision, Tensor cu_text,
                        std::optional<Tensor> cu_vision_q, std::optional<Tensor> cu_text_q,
                        std::optional<Tensor> positions_q, int64_t num_heads, double scale,
                        StringHandle mask, std::optional<Tensor> seen) {
  SharedAttention call;
  take_attention(q, k, v, {cu_vision, cu_text, cu_vision_q, cu_text_q, positions_q}, num_heads,
                 scale, mask, seen, "shared_attention", call);
  Tensor out = rows_like(q, q.size(0), q.size(1));
  if (q.size(0) == 0) return out;
  call.out = out.mutable_data_ptr();
  call.out_stride = q.size(1);
  beit3_fast::cpu::shared_attention(torch_pool(), call);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> shared_attention_gradients(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cu_vision, Tensor cu_text,
    std::optional<Tensor> cu_vision_q, std::optional<Tensor> cu_text_q,
    std::optional<Tensor> positions_q, int64_t num_heads, double scale, StringHandle mask,
    std::optional<Tensor> seen) {
  constexpr const char* op = "shared_attention_gradients";
  SharedAttentionGradients call;
  take_attention(q, k, v, {cu_vision, cu_text, cu_vision_q, cu_text_q, positions_q}, num_heads,
                 scale, mask, seen, op, call);
  const int64_t width = q.size(1);
  require_same_type(grad, q, op, "grad");
  require_matrix(grad, op, "grad");
  require(grad.size(0) == q.size(0) && grad.size(1) == q.size(1), op,
          ": grad must have the shape of q, got ", shape_of(grad));
  Tensor q_grad = rows_like(q, q.size(0), width), k_grad = rows_like(k, k.size(0), width);
  Tensor v_grad = rows_like(v, v.size(0), width);
  call.grad = grad.const_data_ptr();
  call.grad_stride = grad.stride(0);
  call.q_grad = q_grad.mutable_data_ptr();
  call.k_grad = k_grad.mutable_data_ptr();
  call.v_grad = v_grad.mutable_data_ptr();
  beit3_fast::cpu::shared_attention_gradients(torch_pool(), call);
  return {q_grad, k_grad, v_grad};
}

Tensor pack_keys(Tensor k, Tensor v, int64_t num_heads) {
  constexpr const char* op = "pack_keys";
  beit3_fast::cpu::KeysToPack call;
  call.dtype = dtype_of(k, op, "k");
  require(k.dim() == 3, op, ": k must be [B, N, C], got shape ", shape_of(k));
  require_heads(num_heads, k.size(2), op);
  require_cache(k, k, k.size(2), op, "k");
  require_cache(v, k, k.size(2), op, "v");
  require_pair(k, v, op);
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.k_sample = k.stride(0);
  call.k_stride = k.stride(1);
  call.v_sample = v.stride(0);
  call.v_stride = v.stride(1);
  call.samples = k.size(0);
  call.keys = k.size(1);
  call.num_heads = num_heads;
  call.head_dim = k.size(2) / num_heads;
  const int64_t words = beit3_fast::cpu::packed_head_words(call.dtype, call.keys, call.head_dim);
  const int64_t shape[] = {call.samples, num_heads,
                           words * 4 / static_cast<int64_t>(k.element_size())};
  Tensor packed = torch::stable::new_empty(k, {shape, 3});
  beit3_fast::cpu::pack_keys(torch_pool(), call, static_cast<uint32_t*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor cached_attention(Tensor q, Tensor k, Tensor v, Tensor seen, Tensor samples,
                        int64_t num_heads, double scale, std::optional<Tensor> prefix,
                        int64_t prefix_keys) {
  constexpr const char* op = "cached_attention";
  CachedAttention call;
  call.dtype = dtype_of(q, op, "q");
  require(q.dim() == 3 && q.is_contiguous(), op, ": q must be contiguous [S, n, C], got shape ",
          shape_of(q));
  call.sequences = q.size(0);
  call.queries = q.size(1);
  const int64_t width = q.size(2);
  take_cache({k, v, seen, samples, prefix, prefix_keys}, q, num_heads, width, scale, op, call);

  Tensor out = torch::stable::empty_like(q);
  if (q.numel() == 0) return out;
  call.q = q.const_data_ptr();
  call.q_sequence = call.queries * width;
  call.q_stride = width;
  call.out = out.mutable_data_ptr();
  beit3_fast::cpu::cached_attention(torch_pool(), call);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(beit3_fast, m) {
  m.def(
      "shared_attention(Tensor q, Tensor k, Tensor v, Tensor cu_vision, Tensor cu_text, "
      "Tensor? cu_vision_q, Tensor? cu_text_q, Tensor? positions_q, int num_heads, float scale, "
      "str mask, Tensor? seen=None) -> Tensor");
  m.def(
      "shared_attention_gradients(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cu_vision, "
      "Tensor cu_text, Tensor? cu_vision_q, Tensor? cu_text_q, Tensor? positions_q, int num_heads, "
      "float scale, str mask, Tensor? seen=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cached_attention(Tensor q, Tensor k, Tensor v, Tensor seen, Tensor samples, int num_heads, "
      "float scale, Tensor? prefix=None, int prefix_keys=0) -> Tensor");
  m.def("pack_keys(Tensor k, Tensor v, int num_heads) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(beit3_fast, CPU, m) {
  m.impl("shared_attention", TORCH_BOX(&shared_attention));
  m.impl("shared_attention_gradients", TORCH_BOX(&shared_attention_gradients));
  m.impl("cached_attention", TORCH_BOX(&cached_attention));
  m.impl("pack_keys", TORCH_BOX(&pack_keys));
}
