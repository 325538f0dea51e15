#include "packed_keys.h"

#include "elements.h"
#include "isa.h"
#include "packed_weight.h"

namespace beit3_fast::cpu {

int64_t packed_key_words(DType dtype, int64_t keys, int64_t head_dim) {
  return panel_count(keys) * panel_words(dtype, head_dim);
}

int64_t packed_head_words(DType dtype, int64_t keys, int64_t head_dim) {
  return packed_key_words(dtype, keys, head_dim) + panel_count(head_dim) * panel_words(dtype, keys);
}

void pack_keys(const Pool& pool, const KeysToPack& op, uint32_t* packed) {
  const Kernels& level = kernels(op.dtype);
  const int64_t head_words = packed_head_words(op.dtype, op.keys, op.head_dim);
  const int64_t key_panel = panel_words(op.dtype, op.head_dim);
  const int64_t value_panel = panel_words(op.dtype, op.keys);
  share(pool, op.samples * op.num_heads, [&](int64_t task) {
    const int64_t s = task / op.num_heads, column = task % op.num_heads * op.head_dim;
    uint32_t* to = packed + task * head_words;
    for (int64_t first = 0; first < op.keys; first += kPanel, to += key_panel) {
      const int64_t count = op.keys - first < kPanel ? op.keys - first : kPanel;
      const void* rows[kPanel];
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = s * op.k_sample + (first + j) * op.k_stride + column;
        rows[j] = elements_on(op.k, at, op.dtype);
      }
      level.pack_panel(rows, count, op.head_dim, to);
    }
    const void* const values = elements_on(op.v, s * op.v_sample + column, op.dtype);
    for (int64_t from = 0; from < op.head_dim; from += kPanel, to += value_panel) {
      level.pack_transposed(values, op.v_stride, op.keys, op.head_dim, from, to);
    }
  });
}

}  // namespace beit3_fast::cpu
