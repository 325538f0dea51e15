#include "cached_attention.h"

#include "elements.h"
#include "isa.h"
#include "packed_keys.h"

namespace beit3_fast::cpu {

void cached_attention(const Pool& pool, const CachedAttention& op) {
  const Kernels& level = kernels(op.dtype);
  const int64_t width = op.num_heads * op.head_dim;
  const int64_t key_words = packed_key_words(op.dtype, op.prefix_keys, op.head_dim);
  const int64_t head_words = packed_head_words(op.dtype, op.prefix_keys, op.head_dim);
  share(pool, op.sequences * op.num_heads, [&](int64_t task) {
    const int64_t s = task / op.num_heads, head = task % op.num_heads;
    const int64_t column = head * op.head_dim;
    AttentionBlock block{};
    block.q = elements_on(op.q, s * op.q_sequence + column, op.dtype);
    block.k = elements_on(op.k, op.samples[s] * op.k_sample + column, op.dtype);
    block.v = elements_on(op.v, op.samples[s] * op.v_sample + column, op.dtype);
    block.out = const_cast<void*>(elements_on(op.out, s * op.queries * width + column, op.dtype));
    block.q_stride = op.q_stride;
    block.out_stride = width;
    block.k_stride = op.k_stride;
    block.v_stride = op.v_stride;
    block.head_dim = op.head_dim;
    block.vision_keys = op.keys;
    block.vision_queries = block.end = op.queries;
    block.seen = op.seen + s * op.queries * op.keys;
    block.seen_stride = op.keys;
    if (op.prefix != nullptr) {
      block.packed_keys = op.prefix + op.samples[s] * op.prefix_sample + head * head_words;
      block.packed_values = block.packed_keys + key_words;
      block.packed_count = op.prefix_keys;
    }
    block.scale = op.scale;
    level.attention_block(block, task_scratch().at_least(level.attention_scratch(block)));
  });
}

}  // namespace beit3_fast::cpu
