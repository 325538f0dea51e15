// Joint softmax attention over samples whose keys lie in two row ranges: vision and text.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace beit3_fast::cpu {

struct SharedAttention {
  DType dtype = DType::kFloat32;
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  void* out = nullptr;
  int64_t q_stride = 0;
  int64_t k_stride = 0;
  int64_t v_stride = 0;
  int64_t out_stride = 0;
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  // Elements from head to head: head_dim where heads lie side by side.
  int64_t q_head = 0;
  int64_t key_head = 0;  // of k and v
  int64_t out_head = 0;
  const int32_t* cu_vision = nullptr;  // [B + 1], of the keys
  const int32_t* cu_text = nullptr;
  const int32_t* cu_vision_q = nullptr;  // [B + 1], of the queries
  const int32_t* cu_text_q = nullptr;
  const int32_t* positions_q = nullptr;  // may be null
  // [B or 1, N, N] whether a query sees a key, numbered by their positions, those of text from
  // `seen_text` on; `seen_sample` bytes from sample to sample. May be null: all that the mask lets.
  const unsigned char* seen = nullptr;
  int64_t seen_sample = 0;
  int64_t seen_stride = 0;
  int64_t seen_text = 0;
  float scale = 1.0f;
  Mask mask = Mask::kBidirectional;
  // Where the statistics of the rows of out go, by query; those whose heads several threads take
  // are left as unmeasured. Null: none.
  RowStatistics* statistics = nullptr;
};

// `out` is not written; the gradients of q, k and v are contiguous.
struct SharedAttentionGradients : SharedAttention {
  const void* grad = nullptr;  // of the result
  int64_t grad_stride = 0;
  void* q_grad = nullptr;
  void* k_grad = nullptr;
  void* v_grad = nullptr;
};

// Arguments are trusted: the binding layer has checked shapes and ranges.
void shared_attention(const Pool& pool, const SharedAttention& op);
void shared_attention_gradients(const Pool& pool, const SharedAttentionGradients& op);

}  // namespace beit3_fast::cpu
