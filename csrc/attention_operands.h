// What the bindings of attention do with their layouts, masks and caches.
#pragma once

#include <cmath>
#include <optional>
#include <string>

#include "cpu/cached_attention.h"
#include "cpu/packed_keys.h"
#include "cpu/shared_attention.h"
#include "operands.h"

namespace beit3_fast::operands {

inline void require_heads(int64_t num_heads, int64_t width, const char* op) {
  require(num_heads > 0 && width > 0 && width % num_heads == 0, op, ": ", num_heads,
          " heads do not divide a width of ", width);
}

inline void require_scale(double scale, const char* op) {
  require(std::isfinite(scale) && scale >= 0.0, op, ": scale must be finite and not negative, got ",
          scale);
}

inline cpu::Mask mask_of(const std::string& name, const char* op) {
  if (name == "bidirectional") return cpu::Mask::kBidirectional;
  if (name == "seq2seq") return cpu::Mask::kSeq2Seq;
  require(name == "causal", op, ": mask must be 'bidirectional', 'seq2seq' or 'causal', got '",
          name, "'");
  return cpu::Mask::kCausal;
}

// [B + 1] offsets that start at 0 and never decrease.
inline const int32_t* take_offsets(const Tensor& t, int64_t batch, const char* op,
                                   const char* name) {
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

inline void check_positions(const cpu::SharedAttention& call, const char* op) {
  for (int text = 0; text < 2; ++text) {
    const int32_t* keys = text ? call.cu_text : call.cu_vision;
    const int32_t* queries = text ? call.cu_text_q : call.cu_vision_q;
    const int64_t first = text ? call.cu_vision_q[call.batch] : 0;
    for (int64_t s = 0; s < call.batch; ++s) {
      for (int64_t row = first + queries[s]; row < first + queries[s + 1]; ++row) {
        const int32_t position = call.positions_q[row];
        require(position >= 0 && position < keys[s + 1] - keys[s], op, ": positions_q[", row,
                "] is ", position, ", but sample ", s, " has ", keys[s + 1] - keys[s],
                text ? " text" : " vision", " rows");
      }
    }
  }
}

// Where the keys of each sample lie, and its queries where those are only some of the rows.
struct LayoutOperands {
  const Tensor& cu_vision;
  const Tensor& cu_text;
  const std::optional<Tensor>& cu_vision_q;
  const std::optional<Tensor>& cu_text_q;
  const std::optional<Tensor>& positions_q;
};

// Takes the layout of `keys` rows with `queries` queries; the mask of the call is set.
inline void take_layout(const LayoutOperands& own, int64_t keys, int64_t queries, bool has_seen,
                        const char* op, cpu::SharedAttention& call) {
  require(own.cu_vision.dim() == 1 && own.cu_vision.size(0) >= 1, op,
          ": cu_vision must have B + 1 entries");
  call.batch = own.cu_vision.size(0) - 1;
  call.cu_vision = take_offsets(own.cu_vision, call.batch, op, "cu_vision");
  call.cu_text = take_offsets(own.cu_text, call.batch, op, "cu_text");
  const int64_t stored = int64_t{call.cu_vision[call.batch]} + call.cu_text[call.batch];
  require(keys == stored, op, ": k has ", keys, " rows but cu_vision and cu_text end at ", stored,
          " together");
  require(own.cu_vision_q.has_value() == own.cu_text_q.has_value(), op,
          ": cu_vision_q and cu_text_q come together");
  call.cu_vision_q = call.cu_vision;
  call.cu_text_q = call.cu_text;
  if (own.cu_vision_q.has_value()) {
    call.cu_vision_q = take_offsets(*own.cu_vision_q, call.batch, op, "cu_vision_q");
    call.cu_text_q = take_offsets(*own.cu_text_q, call.batch, op, "cu_text_q");
  }
  const int64_t asked = int64_t{call.cu_vision_q[call.batch]} + call.cu_text_q[call.batch];
  require(queries == asked, op, ": q has ", queries, " rows but its offsets end at ", asked,
          " together");
  if (own.positions_q.has_value()) {
    const Tensor& positions = *own.positions_q;
    require(positions.is_cpu() && positions.scalar_type() == ScalarType::Int &&
                positions.dim() == 1 && positions.is_contiguous() && positions.size(0) == queries,
            op, ": positions_q must be a contiguous int32 CPU tensor of ", queries, " entries");
    call.positions_q = static_cast<const int32_t*>(positions.const_data_ptr());
    check_positions(call, op);
  } else {
    require(!own.cu_vision_q.has_value() || (call.mask == cpu::Mask::kBidirectional && !has_seen),
            op,
            ": a mask other than 'bidirectional', or seen, with cu_vision_q and cu_text_q needs ",
            "positions_q");
  }
}

// Samples and rows of a cache [B, N, width] may lie apart, the numbers of a row may not.
inline void require_cache(const Tensor& t, const Tensor& like, int64_t width, const char* op,
                          const char* name) {
  require_same_type(t, like, op, name);
  require(t.dim() == 3 && t.size(2) == width && (t.numel() == 0 || t.stride(2) == 1), op, ": ",
          name, " must be [B, N, ", width, "] with stride 1 in its last dimension, got shape ",
          shape_of(t));
}

inline void require_pair(const Tensor& k, const Tensor& v, const char* op) {
  require(k.size(0) == v.size(0) && k.size(1) == v.size(1), op,
          ": k and v must have the same shape, got ", shape_of(k), " and ", shape_of(v));
}

// Keys that pack_keys packed, as many as `keys`, for each of `samples` samples or more.
inline void take_prefix(const Tensor& prefix, const Tensor& q, int64_t keys, int64_t samples,
                        const char* op, cpu::CachedAttention& call) {
  require_same_type(prefix, q, op, "prefix");
  require(keys > 0, op, ": prefix_keys must be positive, got ", keys);
  const int64_t size = static_cast<int64_t>(q.element_size());
  const int64_t words = cpu::packed_head_words(call.dtype, keys, call.head_dim);
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

// The keys that each sequence of a cache sees.
struct CacheOperands {
  const Tensor& k;
  const Tensor& v;
  const Tensor& seen;
  const Tensor& samples;
  const std::optional<Tensor>& prefix;
  int64_t prefix_keys;
};

// Takes the cache for rows like `q` of `num_heads` heads; dtype, sequences and queries are set.
inline void take_cache(const CacheOperands& own, const Tensor& q, int64_t num_heads, int64_t width,
                       double scale, const char* op, cpu::CachedAttention& call) {
  require_heads(num_heads, width, op);
  require_cache(own.k, q, width, op, "k");
  require_cache(own.v, q, width, op, "v");
  require_pair(own.k, own.v, op);
  call.keys = own.k.size(1);
  const Tensor& seen = own.seen;
  require(seen.is_cpu() && seen.scalar_type() == ScalarType::Bool && seen.is_contiguous() &&
              seen.dim() == 3 && seen.size(0) == call.sequences && seen.size(1) == call.queries &&
              seen.size(2) == call.keys,
          op, ": seen must be a contiguous bool CPU tensor [", call.sequences, ", ", call.queries,
          ", ", call.keys, "], got shape ", shape_of(seen));
  const Tensor& samples = own.samples;
  require(samples.is_cpu() && samples.scalar_type() == ScalarType::Long && samples.dim() == 1 &&
              samples.is_contiguous() && samples.size(0) == call.sequences,
          op, ": samples must be a contiguous int64 CPU tensor of ", call.sequences, " entries");
  call.samples = static_cast<const int64_t*>(samples.const_data_ptr());
  for (int64_t s = 0; s < call.sequences; ++s) {
    require(call.samples[s] >= 0 && call.samples[s] < own.k.size(0), op, ": samples[", s, "] is ",
            call.samples[s], ", but there are ", own.k.size(0), " samples");
  }
  require_scale(scale, op);
  call.num_heads = num_heads;
  call.head_dim = width / num_heads;
  call.scale = static_cast<float>(scale);
  if (own.prefix.has_value()) {
    take_prefix(*own.prefix, q, own.prefix_keys, own.k.size(0), op, call);
  }
  call.k = own.k.const_data_ptr();
  call.v = own.v.const_data_ptr();
  call.k_sample = own.k.stride(0);
  call.k_stride = own.k.stride(1);
  call.v_sample = own.v.stride(0);
  call.v_stride = own.v.stride(1);
  // Not null where there are no keys but packed ones: null says that every key is seen.
  static constexpr unsigned char nothing = 0;
  call.seen = &nothing;
  if (call.keys > 0) call.seen = static_cast<const unsigned char*>(seen.const_data_ptr());
}

}  // namespace beit3_fast::operands
