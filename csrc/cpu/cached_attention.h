// Softmax attention of a few new rows to keys that are kept from call to call.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace beit3_fast::cpu {

struct CachedAttention {
  DType dtype = DType::kFloat32;
  const void* q = nullptr;  // [S, n, H * D], sequences and rows at strides of their own
  const void* k = nullptr;  // [B, N, H * D], samples and rows at strides of their own
  const void* v = nullptr;
  void* out = nullptr;  // [S, n, H * D]
  int64_t q_sequence = 0;
  int64_t q_stride = 0;
  int64_t k_sample = 0;
  int64_t k_stride = 0;
  int64_t v_sample = 0;
  int64_t v_stride = 0;
  const unsigned char* seen = nullptr;  // [S, n, N]
  // Keys in front of those, seen by every row: [B, H, packed_head_words(...)], samples apart.
  const uint32_t* prefix = nullptr;
  int64_t prefix_sample = 0;
  int64_t prefix_keys = 0;
  const int64_t* samples = nullptr;  // [S], the cache sample of each sequence
  int64_t sequences = 0;
  int64_t queries = 0;
  int64_t keys = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  float scale = 1.0f;
};

// Arguments are trusted: the binding layer has checked shapes and ranges.
void cached_attention(const Pool& pool, const CachedAttention& op);

}  // namespace beit3_fast::cpu
