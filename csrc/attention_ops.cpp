// The attention operators on LibTorch's stable ABI, see ops.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "cpu/cached_attention.h"
#include "cpu/packed_keys.h"
#include "cpu/shared_attention.h"
#include "operands.h"

namespace {

using beit3_fast::cpu::CachedAttention;
using beit3_fast::cpu::Mask;
using beit3_fast::cpu::SharedAttention;
using namespace beit3_fast::operands;

void require_heads(int64_t num_heads, int64_t width, const char* op) {
  require(num_heads > 0 && width > 0 && width % num_heads == 0, op, ": ", num_heads,
          " heads do not divide a width of ", width);
}

void require_scale(double scale, const char* op) {
  require(std::isfinite(scale) && scale >= 0.0, op, ": scale must be finite and not negative, got ",
          scale);
}

// [B + 1] offsets that start at 0 and never decrease.
const int32_t* take_offsets(const Tensor& t, int64_t batch, const char* name) {
  constexpr const char* op = "shared_attention";
  require(t.is_cpu() && t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.is_contiguous(), op,
          ": ", name, " must be a contiguous int32 CPU tensor with 1 dimension");
  require(t.size(0) == batch + 1, op, ": ", name, " must have ", batch + 1, " entries, got ",
          t.size(0));
  const auto* offsets = static_cast<const int32_t*>(t.const_data_ptr());
  require(offsets[0] == 0, op, ": ", name, " must start at 0, got ", offsets[0]);
  for (int64_t s = 0; s < batch; ++s) {
    require(offsets[s] <= offsets[s + 1], op, ": ", name, " must not decrease, got ", offsets[s],
            " then ", offsets[s + 1]);
  }
  return offsets;
}

void check_positions(const SharedAttention& call) {
  for (int text = 0; text < 2; ++text) {
    const int32_t* keys = text ? call.cu_text : call.cu_vision;
    const int32_t* queries = text ? call.cu_text_q : call.cu_vision_q;
    const int64_t first = text ? call.cu_vision_q[call.batch] : 0;
    for (int64_t s = 0; s < call.batch; ++s) {
      for (int64_t row = first + queries[s]; row < first + queries[s + 1]; ++row) {
        const int32_t position = call.positions_q[row];
        require(position >= 0 && position < keys[s + 1] - keys[s], "shared_attention: positions_q[",
                row, "] is ", position, ", but sample ", s, " has ", keys[s + 1] - keys[s],
                text ? " text" : " vision", " rows");
      }
    }
  }
}

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

Tensor shared_attention(Tensor q, Tensor k, Tensor v, Tensor cu_vision, Tensor cu_text,
                        std::optional<Tensor> cu_vision_q, std::optional<Tensor> cu_text_q,
                        std::optional<Tensor> positions_q, int64_t num_heads, double scale,
                        StringHandle mask_handle, std::optional<Tensor> seen) {
  constexpr const char* op = "shared_attention";
  const std::string mask = take(mask_handle);
  SharedAttention call;
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
  if (mask == "bidirectional") {
    call.mask = Mask::kBidirectional;
  } else if (mask == "seq2seq") {
    call.mask = Mask::kSeq2Seq;
  } else {
    require(mask == "causal", op, ": mask must be 'bidirectional', 'seq2seq' or 'causal', got '",
            mask, "'");
    call.mask = Mask::kCausal;
  }

  require(cu_vision.dim() == 1 && cu_vision.size(0) >= 1, op,
          ": cu_vision must have B + 1 entries");
  call.batch = cu_vision.size(0) - 1;
  call.cu_vision = take_offsets(cu_vision, call.batch, "cu_vision");
  call.cu_text = take_offsets(cu_text, call.batch, "cu_text");
  const int64_t keys = int64_t{call.cu_vision[call.batch]} + call.cu_text[call.batch];
  require(k.size(0) == keys, op, ": k has ", k.size(0), " rows but cu_vision and cu_text end at ",
          keys, " together");
  require(cu_vision_q.has_value() == cu_text_q.has_value(), op,
          ": cu_vision_q and cu_text_q come together");
  call.cu_vision_q = call.cu_vision;
  call.cu_text_q = call.cu_text;
  if (cu_vision_q.has_value()) {
    call.cu_vision_q = take_offsets(*cu_vision_q, call.batch, "cu_vision_q");
    call.cu_text_q = take_offsets(*cu_text_q, call.batch, "cu_text_q");
  }
  const int64_t queries = int64_t{call.cu_vision_q[call.batch]} + call.cu_text_q[call.batch];
  require(q.size(0) == queries, op, ": q has ", q.size(0), " rows but its offsets end at ", queries,
          " together");
  if (positions_q.has_value()) {
    require(positions_q->is_cpu() && positions_q->scalar_type() == ScalarType::Int &&
                positions_q->dim() == 1 && positions_q->is_contiguous() &&
                positions_q->size(0) == queries,
            op, ": positions_q must be a contiguous int32 CPU tensor of ", queries, " entries");
    call.positions_q = static_cast<const int32_t*>(positions_q->const_data_ptr());
    check_positions(call);
  } else {
    require(!cu_vision_q.has_value() || (call.mask == Mask::kBidirectional && !seen.has_value()),
            op, ": mask '", mask, "' or seen with cu_vision_q and cu_text_q needs positions_q");
  }
  if (seen.has_value()) take_seen(*seen, call);

  const int64_t shape[] = {queries, width};
  Tensor out = torch::stable::new_empty(q, {shape, 2});
  if (queries == 0) return out;
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.q_stride = q.stride(0);
  call.k_stride = k.stride(0);
  call.v_stride = v.stride(0);
  call.out_stride = width;
  call.num_heads = num_heads;
  call.head_dim = width / num_heads;
  call.scale = static_cast<float>(scale);
  beit3_fast::cpu::shared_attention(torch_pool(), call);
  return out;
}

// Samples and rows of a cache may lie apart, the numbers of a row may not.
void require_cache(const Tensor& t, const Tensor& like, const char* op, const char* name) {
  require_same_type(t, like, op, name);
  require(t.dim() == 3 && t.size(2) == like.size(2) && (t.numel() == 0 || t.stride(2) == 1), op,
          ": ", name, " must be [B, N, ", like.size(2),
          "] with stride 1 in its last dimension, got shape ", shape_of(t));
}

void require_pair(const Tensor& k, const Tensor& v, const char* op) {
  require(k.size(0) == v.size(0) && k.size(1) == v.size(1), op,
          ": k and v must have the same shape, got ", shape_of(k), " and ", shape_of(v));
}

Tensor pack_keys(Tensor k, Tensor v, int64_t num_heads) {
  constexpr const char* op = "pack_keys";
  beit3_fast::cpu::KeysToPack call;
  call.dtype = dtype_of(k, op, "k");
  require(k.dim() == 3, op, ": k must be [B, N, C], got shape ", shape_of(k));
  require_heads(num_heads, k.size(2), op);
  require_cache(k, k, op, "k");
  require_cache(v, k, op, "v");
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

// Keys that pack_keys packed, as many as `keys`, for each of `samples` samples or more.
void take_prefix(const Tensor& prefix, const Tensor& q, int64_t keys, int64_t samples,
                 CachedAttention& call) {
  constexpr const char* op = "cached_attention";
  require_same_type(prefix, q, op, "prefix");
  require(keys > 0, op, ": prefix_keys must be positive, got ", keys);
  const int64_t size = static_cast<int64_t>(q.element_size());
  const int64_t words = beit3_fast::cpu::packed_head_words(call.dtype, keys, call.head_dim);
  require(prefix.dim() == 3 && prefix.size(0) == samples && prefix.size(1) == call.num_heads &&
              prefix.size(2) * size == words * 4 && prefix.stride(2) == 1 &&
              prefix.stride(1) == prefix.size(2),
          op, ": prefix must be [", samples, ", ", call.num_heads, ", ", words * 4 / size,
          "] as pack_keys packs ", keys, " keys, got shape ", shape_of(prefix));
  call.prefix = static_cast<const uint32_t*>(prefix.const_data_ptr());
  call.prefix_sample = prefix.stride(0) * size / 4;
  call.prefix_keys = keys;
  require(reinterpret_cast<uintptr_t>(call.prefix) % 64 == 0 && call.prefix_sample % 16 == 0, op,
          ": prefix must begin at a cache line");
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
  require_heads(num_heads, width, op);
  require_cache(k, q, op, "k");
  require_cache(v, q, op, "v");
  require_pair(k, v, op);
  call.keys = k.size(1);
  require(seen.is_cpu() && seen.scalar_type() == ScalarType::Bool && seen.is_contiguous() &&
              seen.dim() == 3 && seen.size(0) == call.sequences && seen.size(1) == call.queries &&
              seen.size(2) == call.keys,
          op, ": seen must be a contiguous bool CPU tensor [", call.sequences, ", ", call.queries,
          ", ", call.keys, "], got shape ", shape_of(seen));
  require(samples.is_cpu() && samples.scalar_type() == ScalarType::Long && samples.dim() == 1 &&
              samples.is_contiguous() && samples.size(0) == call.sequences,
          op, ": samples must be a contiguous int64 CPU tensor of ", call.sequences, " entries");
  call.samples = static_cast<const int64_t*>(samples.const_data_ptr());
  for (int64_t s = 0; s < call.sequences; ++s) {
    require(call.samples[s] >= 0 && call.samples[s] < k.size(0), op, ": samples[", s, "] is ",
            call.samples[s], ", but there are ", k.size(0), " samples");
  }
  require_scale(scale, op);
  call.num_heads = num_heads;
  call.head_dim = width / num_heads;
  if (prefix.has_value()) take_prefix(*prefix, q, prefix_keys, k.size(0), call);

  Tensor out = torch::stable::empty_like(q);
  if (q.numel() == 0) return out;
  call.q = q.const_data_ptr();
  call.k = k.const_data_ptr();
  call.v = v.const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.k_sample = k.stride(0);
  call.k_stride = k.stride(1);
  call.v_sample = v.stride(0);
  call.v_stride = v.stride(1);
  // Not null where there are no keys but packed ones: null says that every key is seen.
  static constexpr unsigned char nothing = 0;
  call.seen = &nothing;
  if (call.keys > 0) call.seen = static_cast<const unsigned char*>(seen.const_data_ptr());
  call.scale = static_cast<float>(scale);
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
      "cached_attention(Tensor q, Tensor k, Tensor v, Tensor seen, Tensor samples, int num_heads, "
      "float scale, Tensor? prefix=None, int prefix_keys=0) -> Tensor");
  m.def("pack_keys(Tensor k, Tensor v, int num_heads) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(beit3_fast, CPU, m) {
  m.impl("shared_attention", TORCH_BOX(&shared_attention));
  m.impl("cached_attention", TORCH_BOX(&cached_attention));
  m.impl("pack_keys", TORCH_BOX(&pack_keys));
}
