// Keys and values that many calls of cached_attention read, in the layout of kernels.h: an image's,
// which no step of decoding changes.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace beit3_fast::cpu {

// Words of one head: panels of kPanel keys, behind them panels of kPanel columns of the values.
int64_t packed_key_words(DType dtype, int64_t keys, int64_t head_dim);
int64_t packed_head_words(DType dtype, int64_t keys, int64_t head_dim);

struct KeysToPack {
  DType dtype = DType::kFloat32;
  const void* k = nullptr;  // [B, N, H * D], samples and rows at strides of their own
  const void* v = nullptr;
  int64_t k_sample = 0;
  int64_t k_stride = 0;
  int64_t v_sample = 0;
  int64_t v_stride = 0;
  int64_t samples = 0;
  int64_t keys = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
};

// `packed` needs samples * num_heads * packed_head_words(...) words and begins at a cache line.
void pack_keys(const Pool& pool, const KeysToPack& op, uint32_t* packed);

}  // namespace beit3_fast::cpu
