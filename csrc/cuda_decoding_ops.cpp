// The CUDA kernels of captioning steps on LibTorch's stable ABI, as cuda_ops.cpp has the others.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <utility>

#include "cuda/decode_attention.h"
#include "cuda/head_top_k.h"
#include "cuda_operands.h"

namespace {

using namespace beit3_fast::operands;
using beit3_fast::cuda::DecodeAttention;
using beit3_fast::cuda::HeadTopK;

void require_batch(const Tensor& t, const Tensor& first, const char* op, const char* name) {
  require_half(t, first, op, name);
  require(t.dim() == 3 && (t.size(2) <= 1 || t.numel() == 0 || t.stride(2) == 1), op, ": ", name,
          " must have 3 dimensions and stride 1 in the last, got shape ", shape_of(t));
}

// Keys and values that the kernel is to write into the cache.
void take_new_keys(DecodeAttention& call, const Tensor& q, const std::optional<Tensor>& k,
                   const std::optional<Tensor>& v, const std::optional<Tensor>& place,
                   const char* op) {
  require(k.has_value() == v.has_value() && (k.has_value() || !place.has_value()), op,
          ": new_k, new_v and place come together");
  if (!k.has_value()) return;
  require_batch(*k, q, op, "new_k");
  require_batch(*v, q, op, "new_v");
  require(k->size(0) == q.size(0) && k->size(2) == q.size(2) && v->size(0) == q.size(0) &&
              v->size(1) == k->size(1) && v->size(2) == q.size(2),
          op, ": new_k and new_v must have the sequences and the width of q, got ", shape_of(*k),
          " and ", shape_of(*v));
  call.new_k = k->const_data_ptr();
  call.new_v = v->const_data_ptr();
  call.new_k_sequence = k->stride(0);
  call.new_k_stride = k->stride(1);
  call.new_v_sequence = v->stride(0);
  call.new_v_stride = v->stride(1);
  call.num_new = k->size(1);
  if (place.has_value()) {
    call.place = numbers_of<int64_t>(*place, q, ScalarType::Long, 1, op, "place");
  }
}

void decode_attention(Tensor q, Tensor k, Tensor v, Tensor seen, std::optional<Tensor> samples,
                      std::optional<Tensor> new_k, std::optional<Tensor> new_v,
                      std::optional<Tensor> place, int64_t first, int64_t front, int64_t num_heads,
                      double scale, Tensor o, std::optional<Tensor> parts, int64_t stream) {
  constexpr const char* op = "launch_decode_attention";
  for (const auto& [t, name] : {std::pair{q, "q"}, {k, "k"}, {v, "v"}, {o, "o"}}) {
    require_batch(t, q, op, name);
  }
  const int64_t count = q.size(0), rows = q.size(1), width = q.size(2), keys = k.size(1);
  require(num_heads > 0 && width % num_heads == 0, op, ": ", num_heads,
          " heads do not divide a width of ", width);
  require(k.size(2) == width && v.size(2) == width && k.size(0) == v.size(0) && keys == v.size(1),
          op, ": k and v must have the same rows and the width of q, got ", shape_of(k), " and ",
          shape_of(v));
  require(o.size(0) == count && o.size(1) == rows && o.size(2) == width && o.is_contiguous(), op,
          ": o must be contiguous, of the shape of q, got ", shape_of(o));
  require(std::isfinite(scale) && scale >= 0.0, op, ": scale must be finite and not negative, got ",
          scale);
  require(front >= 0 && front <= keys, op, ": front must be from 0 to ", keys, ", got ", front);
  require(on_device(seen) && seen.scalar_type() == ScalarType::Bool && seen.dim() == 3 &&
              seen.size(0) == count && seen.size(1) == rows && seen.size(2) == keys - front &&
              (seen.size(2) <= 1 || seen.stride(2) == 1),
          op, ": seen must be bool [", count, ", ", rows, ", ", keys - front, "], got ",
          shape_of(seen));
  DecodeAttention call;
  call.element = element_of<DecodeAttention>(q);
  call.q = q.const_data_ptr();
  call.k = k.mutable_data_ptr();
  call.v = v.mutable_data_ptr();
  call.o = o.mutable_data_ptr();
  call.q_sequence = q.stride(0);
  call.q_stride = q.stride(1);
  call.k_sample = k.stride(0);
  call.k_stride = k.stride(1);
  call.v_sample = v.stride(0);
  call.v_stride = v.stride(1);
  call.seen = static_cast<const uint8_t*>(seen.const_data_ptr());
  call.seen_sequence = seen.stride(0);
  call.seen_stride = seen.stride(1);
  if (samples.has_value()) {
    call.samples = numbers_of<int32_t>(*samples, q, ScalarType::Int, count, op, "samples");
  } else {
    require(k.size(0) == count, op, ": without samples, k must have those of ", count,
            " sequences, got ", k.size(0));
  }
  if (parts.has_value()) {
    const int64_t numbers = 2 * count * rows * num_heads;
    call.parts = numbers_of<float>(*parts, q, ScalarType::Float, numbers, op, "parts");
  }
  take_new_keys(call, q, new_k, new_v, place, op);
  call.first = first;
  call.num_sequences = count;
  call.num_rows = rows;
  call.num_keys = keys;
  call.front = front;
  call.num_heads = num_heads;
  call.head_dim = width / num_heads;
  call.scale = static_cast<float>(scale);
  raise(op, beit3_fast::cuda::decode_attention_obstacle(call));
  const DeviceGuard guard(q);
  raise(op, beit3_fast::cuda::decode_attention(call, stream_of(stream)));
}

void head_top_k(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> allowed,
                Tensor peaks, Tensor best, Tensor log_p, Tensor ids, int64_t stream) {
  constexpr const char* op = "launch_head_top_k";
  require_rows(x, x, op, "x");
  require_rows(weight, x, op, "weight");
  const int64_t rows = x.size(0), classes = weight.size(0);
  require(weight.size(1) == x.size(1) && weight.is_contiguous(), op,
          ": weight must be contiguous and have the features of x, got ", shape_of(weight));
  require(log_p.dim() == 2, op, ": log_p must be [rows, count], got ", shape_of(log_p));
  const int64_t count = log_p.size(1);
  const int64_t tiles = (classes + HeadTopK::kTileClasses - 1) / HeadTopK::kTileClasses;
  HeadTopK call;
  call.element = element_of<HeadTopK>(x);
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.weight = weight.const_data_ptr();
  if (bias.has_value()) {
    call.bias = numbers_of<uint16_t>(*bias, x, x.scalar_type(), classes, op, "bias");
  }
  if (allowed.has_value()) {
    call.allowed = numbers_of<uint8_t>(*allowed, x, ScalarType::Bool, classes, op, "allowed");
  }
  call.peaks = numbers_of<float>(peaks, x, ScalarType::Float, rows * tiles * 2, op, "peaks");
  call.best = numbers_of<uint64_t>(best, x, ScalarType::Long, rows * tiles * count, op, "best");
  call.log_p = numbers_of<float>(log_p, x, ScalarType::Float, rows * count, op, "log_p");
  call.ids = numbers_of<int64_t>(ids, x, ScalarType::Long, rows * count, op, "ids");
  call.num_rows = rows;
  call.features = x.size(1);
  call.classes = classes;
  call.count = count;
  raise(op, beit3_fast::cuda::head_top_k_obstacle(call));
  const DeviceGuard guard(x);
  raise(op, beit3_fast::cuda::head_top_k(call, stream_of(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(BEIT3_FAST_NAMESPACE, m) {
  m.def(
      "launch_decode_attention(Tensor q, Tensor(a!) k, Tensor(b!) v, Tensor seen, Tensor? samples, "
      "Tensor? new_k, Tensor? new_v, Tensor? place, int first, int front, int num_heads, float "
      "scale, Tensor(c!) o, Tensor(d!)? parts, int stream) -> ()");
  m.def(
      "launch_head_top_k(Tensor x, Tensor weight, Tensor? bias, Tensor? allowed, "
      "Tensor(a!) peaks, Tensor(b!) best, Tensor(c!) log_p, Tensor(d!) ids, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(BEIT3_FAST_NAMESPACE, BEIT3_FAST_DEVICE, m) {
  m.impl("launch_decode_attention", TORCH_BOX(&decode_attention));
  m.impl("launch_head_top_k", TORCH_BOX(&head_top_k));
}
