#include "shared_attention.h"

#include <algorithm>
#include <vector>

#include "elements.h"
#include "isa.h"

namespace beit3_fast::cpu {
namespace {

// Each block of queries packs the keys and values anew; below this many it is not worth it.
constexpr int64_t kFewQueries = 192;
constexpr int64_t kTasksPerThread = 4;
// What a thread keeps of each query while it goes through many keys is that of so many at most.
constexpr int64_t kMostQueries = 4096;
// How much longer than the others a thread may work so that rows are measured while they are near.
constexpr double kEvenly = 1.03;

// Sample s and the columns of a head, with all queries.
void take_head(const SharedAttention& op, int64_t s, int64_t head, AttentionBlock& block) {
  const auto on = [&](const void* data, int64_t stride) {
    return elements_on(data, head * stride, op.dtype);
  };
  block.q = on(op.q, op.q_head);
  block.k = on(op.k, op.key_head);
  block.v = on(op.v, op.key_head);
  block.q_stride = op.q_stride;
  block.k_stride = op.k_stride;
  block.v_stride = op.v_stride;
  block.head_dim = op.head_dim;
  block.key_vision_row = op.cu_vision[s];
  block.key_text_row = op.cu_vision[op.batch] + op.cu_text[s];
  block.vision_keys = op.cu_vision[s + 1] - op.cu_vision[s];
  block.text_keys = op.cu_text[s + 1] - op.cu_text[s];
  block.query_vision_row = op.cu_vision_q[s];
  block.query_text_row = op.cu_vision_q[op.batch] + op.cu_text_q[s];
  block.vision_queries = op.cu_vision_q[s + 1] - op.cu_vision_q[s];
  block.text_queries = op.cu_text_q[s + 1] - op.cu_text_q[s];
  block.positions = op.positions_q;
  if (op.seen != nullptr) block.seen = op.seen + s * op.seen_sample;
  block.seen_stride = op.seen_stride;
  block.seen_text = op.seen_text;
  block.end = block.vision_queries + block.text_queries;
  block.scale = op.scale;
  block.mask = op.mask;
}

// Whether threads that take whole samples, in `parts` parts, would be about equally busy.
bool samples_share_evenly(const SharedAttention& op, int64_t parts, int64_t threads) {
  thread_local std::vector<double> busy;
  busy.assign(static_cast<std::size_t>(threads), 0.0);
  double total = 0.0;
  for (int64_t s = 0; s < op.batch; ++s) {
    AttentionBlock block{};
    take_head(op, s, 0, block);
    const auto work = static_cast<double>(block.end * (block.vision_keys + block.text_keys));
    for (int64_t part = 0; part < parts; ++part) {
      *std::min_element(busy.begin(), busy.end()) += work / static_cast<double>(parts);
    }
    total += work;
  }
  return *std::max_element(busy.begin(), busy.end()) * static_cast<double>(threads) <
         kEvenly * total;
}

// Statistics of the rows of queries [begin, end) of a sample, whose heads are all there.
void measure_queries(const SharedAttention& op, const Kernels& level, const AttentionBlock& block) {
  const auto measure = [&](int64_t first, int64_t begin, int64_t end) {
    if (begin >= end) return;
    StatisticsBlock rows{};
    const int64_t row = first + begin;
    rows.x = elements_on(op.out, row * op.out_stride, op.dtype);
    rows.x_stride = op.out_stride;
    if (op.out_head != op.head_dim) rows.x_strip = op.out_head;
    rows.count = end - begin;
    rows.width = op.num_heads * op.head_dim;
    rows.out = op.statistics + row;
    level.row_statistics(rows);
  };
  const int64_t vision = block.vision_queries;
  measure(block.query_vision_row, block.begin, std::min(block.end, vision));
  measure(block.query_text_row, std::max(block.begin, vision) - vision, block.end - vision);
}

}  // namespace

void shared_attention(const Pool& pool, const SharedAttention& op) {
  const Kernels& level = kernels(op.dtype);
  int64_t longest = 0;
  for (int64_t s = 0; s < op.batch; ++s) {
    longest = std::max<int64_t>(
        longest, op.cu_vision_q[s + 1] - op.cu_vision_q[s] + op.cu_text_q[s + 1] - op.cu_text_q[s]);
  }
  const int64_t pairs = op.batch * op.num_heads;
  if (pairs == 0 || longest == 0) return;
  const int64_t wanted = (pool.threads * kTasksPerThread + pairs - 1) / pairs;
  const int64_t shared =
      pool.threads > 1 ? std::clamp<int64_t>(longest / kFewQueries, 1, std::max<int64_t>(wanted, 1))
                       : 1;
  const int64_t parts = std::max(shared, ceil_div(longest, kMostQueries));

  const auto attend = [&](int64_t s, int64_t head, int64_t part) {
    AttentionBlock block{};
    take_head(op, s, head, block);
    block.out = const_cast<void*>(elements_on(op.out, head * op.out_head, op.dtype));
    block.out_stride = op.out_stride;
    const int64_t queries = block.end;
    block.begin = queries * part / parts;
    block.end = queries * (part + 1) / parts;
    if (block.begin < block.end) {
      level.attention_block(block, task_scratch().at_least(level.attention_scratch(block)));
    }
    return block;
  };
  if (op.statistics != nullptr && samples_share_evenly(op, parts, pool.threads)) {
    share(pool, op.batch * parts, [&](int64_t task) {
      AttentionBlock block{};
      for (int64_t head = 0; head < op.num_heads; ++head) {
        block = attend(task / parts, head, task % parts);
      }
      measure_queries(op, level, block);
    });
    return;
  }
  if (op.statistics != nullptr) {
    const int64_t queries = op.cu_vision_q[op.batch] + op.cu_text_q[op.batch];
    std::fill_n(op.statistics, queries, kUnmeasured);
  }
  share(pool, pairs * parts, [&](int64_t task) {
    attend(task / parts / op.num_heads, task / parts % op.num_heads, task % parts);
  });
}

void shared_attention_gradients(const Pool& pool, const SharedAttentionGradients& op) {
  const Kernels& level = kernels(op.dtype);
  share(pool, op.batch * op.num_heads, [&](int64_t task) {
    const int64_t head = task % op.num_heads;
    const auto on = [&](const void* data) {
      return const_cast<void*>(elements_on(data, head * op.head_dim, op.dtype));
    };
    AttentionGradientsBlock block{};
    take_head(op, task / op.num_heads, head, block);
    block.grad = on(op.grad);
    block.grad_stride = op.grad_stride;
    block.q_grad = on(op.q_grad);
    block.k_grad = on(op.k_grad);
    block.v_grad = on(op.v_grad);
    block.grad_width = op.num_heads * op.head_dim;
    level.gradients_block(block, task_scratch().at_least(level.gradients_scratch(block)));
  });
}

}  // namespace beit3_fast::cpu
