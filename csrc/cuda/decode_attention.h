// Attention of decoding steps on a GPU: the launcher of the kernel in decode_attention.cuh.
#pragma once

#include <cstdint>

struct CUstream_st;  // what cudaStream_t points to

namespace beit3_fast::cuda {

// A few new rows of each sequence against the keys that its sample has in a cache. All pointers are
// to device memory, all strides in elements.
struct DecodeAttention {
  enum class Element : int32_t { kBFloat16, kFloat16 };

  Element element = Element::kBFloat16;
  const void* q = nullptr;  // [num_sequences, num_rows, num_heads * head_dim]
  void* k = nullptr;        // [samples, num_keys, num_heads * head_dim], no two places overlap
  void* v = nullptr;        // as k
  void* o = nullptr;        // as q, contiguous
  // fp32 [num_sequences, num_rows, num_heads, 2]: mean and sum of squared deviations of each head
  // of o; may be null.
  float* parts = nullptr;
  int64_t q_sequence = 0;  // from a sequence to the next
  int64_t q_stride = 0;    // from a row to the next
  int64_t k_sample = 0;
  int64_t k_stride = 0;
  int64_t v_sample = 0;
  int64_t v_stride = 0;
  // [num_sequences, num_rows, num_keys - front], not zero where a row sees a key; every row sees
  // the first `front` keys.
  const uint8_t* seen = nullptr;
  int64_t seen_sequence = 0;
  int64_t seen_stride = 0;
  // [num_sequences]: the sample whose keys a sequence reads; null: sequence i those of sample i.
  const int32_t* samples = nullptr;
  // [num_sequences, num_new, num_heads * head_dim]: what is first written into the cache, at the
  // places from *place on; with a null pointer from `first` on. Places outside it are left out. No
  // two sequences may have the same sample then.
  const void* new_k = nullptr;
  const void* new_v = nullptr;
  int64_t new_k_sequence = 0;
  int64_t new_k_stride = 0;
  int64_t new_v_sequence = 0;
  int64_t new_v_stride = 0;
  const int64_t* place = nullptr;
  int64_t first = 0;
  int64_t num_new = 0;
  int64_t num_sequences = 0;
  int64_t num_rows = 0;
  int64_t num_keys = 0;
  int64_t front = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  float scale = 1.0f;  // finite, not negative
};

// Why the kernel does not take such operands, or null. Pointers are looked at, not followed.
const char* decode_attention_obstacle(const DecodeAttention& op);

// Enqueues the kernel (8.0 and newer) on a stream of the current device. Returns why it could not
// be launched, or null.
const char* decode_attention(const DecodeAttention& op, CUstream_st* stream);

}  // namespace beit3_fast::cuda
