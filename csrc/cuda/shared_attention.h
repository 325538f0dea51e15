// Joint softmax attention on a GPU: the launcher of the kernels in attention_*.cuh.
#pragma once

#include <cstdint>

struct CUstream_st;  // what cudaStream_t points to

namespace beit3_fast::cuda {

// All pointers are to device memory. Rows are packed as in TokenLayout: the vision rows of all
// samples, then their text rows; cu_text counts from the last vision row.
struct SharedAttention {
  enum class Element : int32_t { kBFloat16, kFloat16 };
  enum class Mask : int32_t { kBidirectional, kSeq2Seq, kCausal };

  Element element = Element::kBFloat16;
  Mask mask = Mask::kBidirectional;
  const void* q = nullptr;  // [num_queries, num_heads * head_dim], the strides in elements
  const void* k = nullptr;  // [num_keys, num_heads * head_dim]
  const void* v = nullptr;  // as k
  void* o = nullptr;        // as q; may be null where `rounded` is not
  int64_t q_stride = 0;
  int64_t k_stride = 0;
  int64_t v_stride = 0;
  int64_t o_stride = 0;
  // fp32 [num_queries, num_heads]: log2 of the sum of exp(scores), -inf where no key is seen; may
  // be null.
  float* lse = nullptr;
  // fp32 [num_queries, num_heads, 2]: mean and sum of squared deviations of each head of o; may be
  // null.
  float* parts = nullptr;
  // o in 8 bits as the next product reads it: e4m3 [num_queries, num_heads * head_dim], contiguous,
  // and its scales [num_queries, ceil(num_heads * head_dim / kBlock)]. Nothing in o is larger than
  // the largest of v, so the scale of kBlock columns is the largest that they have in the rows of v
  // of the sample; `v_scales` has those, as the product that wrote v left them. bfloat16 and
  // compute capability 9.0 only. All three are null or none.
  static constexpr int kBlock = 128;
  const float* v_scales = nullptr;  // [num_keys, as rounded_scales]
  int64_t v_scales_stride = 0;
  void* rounded = nullptr;
  float* rounded_scales = nullptr;
  const int32_t* cu_vision = nullptr;  // [batch + 1], of the keys
  const int32_t* cu_text = nullptr;
  const int32_t* cu_vision_q = nullptr;  // [batch + 1], of the queries; those of the keys if all
  const int32_t* cu_text_q = nullptr;
  // [num_queries], ascending within each range: the place of a selected query in the vision or text
  // rows of its sample. Null: all rows are queries.
  const int32_t* positions_q = nullptr;
  int64_t num_queries = 0;
  int64_t num_keys = 0;
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  int64_t longest_keys = 0;     // most keys of a sample
  int64_t longest_queries = 0;  // most queries of a sample
  float scale = 1.0f;           // finite, not negative
};

// Why the kernels do not take such operands, or null. Pointers are looked at, not followed.
const char* shared_attention_obstacle(const SharedAttention& op);

// Enqueues the kernel on a stream of the current device: one for compute capability 9.0 where the
// library holds it, else the portable one (8.0 and newer). What the obstacle does not speak of is
// trusted: offsets in range, longest_* at least the real ones. Returns why it could not be
// launched, or null.
const char* shared_attention(const SharedAttention& op, CUstream_st* stream);

}  // namespace beit3_fast::cuda
