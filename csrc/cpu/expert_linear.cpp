#include "expert_linear.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>

#include "isa.h"
#include "packed_weight.h"

namespace beit3_fast::cpu {
namespace {

// What a thread keeps for the weights that training packs anew in every call: room for the widest
// product of the large model in fp32. New memory costs up to as much as packing into it.
constexpr int64_t kMostPacked = int64_t{40} << 20;

// A multiple of the rows of the lower tiles of all levels.
constexpr int64_t kWholeTiles = 12;

// More pieces of a block would spend their time on its rows, which each of them converts.
constexpr int64_t kMostPieces = 4;

// The longest first: the last to finish is then a short one.
void sort_by_size(std::vector<LinearBlock>* tasks) {
  const auto size = [](const LinearBlock& task) {
    return task.count * (task.panel_end - task.panel_begin);
  };
  std::sort(tasks->begin(), tasks->end(), [&](const LinearBlock& a, const LinearBlock& b) {
    return std::tuple(-size(a), a.first, a.panel_begin) <
           std::tuple(-size(b), b.first, b.panel_begin);
  });
}

// What is left when every thread has had as many tasks is cut at panels: two threads with eleven
// blocks would otherwise work as long as with twelve.
void share_the_rest(int64_t threads, std::vector<LinearBlock>* tasks) {
  const auto count = static_cast<int64_t>(tasks->size());
  const int64_t rest = count % threads;
  if (count < threads || rest == 0) return;
  const int64_t wanted = std::min(kMostPieces, threads / std::gcd(rest, threads));
  for (int64_t i = count - rest; i < count; ++i) {
    const LinearBlock whole = (*tasks)[static_cast<std::size_t>(i)];
    const int64_t width = whole.panel_end - whole.panel_begin;
    const int64_t pieces = std::min(wanted, width);
    const auto cut = [&](int64_t piece) { return whole.panel_begin + width * piece / pieces; };
    (*tasks)[static_cast<std::size_t>(i)].panel_end = cut(1);
    for (int64_t piece = 1; piece < pieces; ++piece) {
      tasks->push_back(whole);
      tasks->back().panel_begin = cut(piece);
      tasks->back().panel_end = cut(piece + 1);
    }
  }
  sort_by_size(tasks);
}

// Blocks of equally many rows, each cut into ranges of panels; blocks begin at multiples of `grain`
// rows.
struct Cut {
  int64_t parts;
  int64_t splits;
  int64_t grain;
};

Cut cut_rows(const LinearKernels& level, int64_t rows, int64_t in_features, int64_t panels,
             int64_t workers) {
  const int64_t least = ceil_div(rows, level.most_rows(in_features));
  if (level.high_blocks) {
    // Rather ranges of panels than lower blocks, and as much for every thread.
    int64_t parts = least < workers ? least : ceil_div(least, workers) * workers;
    while (workers % parts != 0 && parts < workers && (parts + 1) * kFewRows <= rows) ++parts;
    if (parts < workers && workers % parts != 0) parts = least;
    return {parts, std::clamp<int64_t>(ceil_div(workers, parts), 1, panels), level.tile_rows};
  }
  const int64_t parts =
      std::min(ceil_div(least, workers) * workers, std::max<int64_t>(1, rows / kFewRows));
  // Many blocks are made of whole tiles, as their size in rows matters less than lower tiles do.
  return {parts, std::clamp<int64_t>(ceil_div(workers, parts), 1, panels),
          parts >= 4 * workers ? kWholeTiles : 1};
}

// Row blocks, and where they are too few for the threads, ranges of panels.
void plan(const Pool& pool, const LinearKernels& level, const ExpertLinear& op,
          const std::vector<LinearBlock>& experts, std::vector<LinearBlock>* tasks) {
  int64_t total = 0;
  for (const LinearBlock& expert : experts) total += expert.count;
  if (total == 0) return;
  const int64_t panels = panel_count(op.out_features);
  for (const LinearBlock& expert : experts) {
    // The share of the threads that this expert's rows are worth: its blocks are a multiple of it.
    const int64_t workers = std::max<int64_t>(1, (pool.threads * expert.count + total / 2) / total);
    const Cut cut = cut_rows(level, expert.count, op.in_features, panels, workers);
    const auto edge = [&](int64_t part) {
      return first_row(expert.count, cut.grain, part, cut.parts);
    };
    for (int64_t part = 0; part < cut.parts; ++part) {
      for (int64_t split = 0; split < cut.splits; ++split) {
        LinearBlock task = expert;
        task.first = expert.first + edge(part);
        task.count = edge(part + 1) - edge(part);
        task.panel_begin = panels * split / cut.splits;
        task.panel_end = panels * (split + 1) / cut.splits;
        if (task.count > 0) tasks->push_back(task);
      }
    }
  }
  sort_by_size(tasks);
  share_the_rest(pool.threads, tasks);
  if (op.statistics == nullptr) return;
  for (LinearBlock& task : *tasks) {
    if (task.panel_begin == 0 && task.panel_end == panels) continue;
    task.statistics = nullptr;
    for (int64_t r = task.first; r < task.first + task.count; ++r) {
      op.statistics[op.rows == nullptr ? r : op.rows[r]] = kUnmeasured;
    }
  }
}

}  // namespace

const Kernels& level_of(const ExpertLinear& op) {
  return op.int8 ? int8_kernels(op.dtype) : kernels(op.dtype);
}

std::vector<LinearBlock> whole_blocks(const Pool& pool, const ExpertLinear& op,
                                      BlockMemory& memory) {
  const int64_t in_padded = ceil_div(op.in_features, 64) * 64;
  const int64_t out_padded = panel_count(op.out_features) * kPanel;
  const auto count = static_cast<int64_t>(op.experts.size());
  auto* at = static_cast<float*>(memory.parameters.at_least(count * (out_padded + 2 * in_padded) *
                                                            static_cast<int64_t>(sizeof(float))));
  const int64_t weight_bytes = packed_bytes(op.dtype, op.out_features, op.in_features);
  const int64_t unpacked = std::count_if(op.experts.begin(), op.experts.end(), [](const Expert& e) {
    return e.packed.empty() && e.end > e.begin;
  });
  char* pack_at =
      unpacked == 0 ? nullptr : static_cast<char*>(memory.packed.at_least(unpacked * weight_bytes));

  std::size_t parts = 0;
  for (const Expert& expert : op.experts) parts += std::max<std::size_t>(1, expert.packed.size());
  std::vector<const uint32_t*>& panels = memory.panels;
  panels.clear();
  panels.reserve(parts);
  std::vector<LinearBlock> experts;
  experts.reserve(op.experts.size());
  for (const Expert& expert : op.experts) {
    if (expert.end <= expert.begin) continue;
    LinearBlock block{};
    block.x = op.x;
    block.x_stride = op.x_stride;
    block.x_strip = op.x_strip;
    block.residual = op.residual;
    block.residual_stride = op.residual_stride;
    block.out = op.out;
    block.out_stride = op.out_stride;
    block.out_strip = op.out_strip;
    block.rows = op.rows;
    block.x_statistics = op.x_statistics;
    block.statistics = op.statistics;
    block.first = expert.begin;
    block.count = expert.end - expert.begin;
    block.in_features = op.in_features;
    block.out_features = op.out_features;
    block.panel_end = panel_count(op.out_features);
    block.eps = op.eps;
    block.activation = op.activation;
    const std::size_t first_part = panels.size();
    if (expert.packed.empty()) {
      pack_weight(pool, op.dtype, expert.weight, expert.weight_stride, op.out_features,
                  op.in_features, pack_at);
      panels.push_back(panels_of(pack_at));
      pack_at += weight_bytes;
    }
    for (const void* part : expert.packed) panels.push_back(panels_of(part));
    block.parts = panels.data() + first_part;
    block.part_panels =
        panel_count(op.out_features / static_cast<int64_t>(panels.size() - first_part));
    if (!expert.bias.empty()) {
      const auto bias_parts = static_cast<int64_t>(expert.bias.size());
      const int64_t height = op.out_features / bias_parts;
      for (int64_t i = 0; i < bias_parts; ++i) {
        const int64_t padded = i + 1 < bias_parts ? height : out_padded - i * height;
        to_float(expert.bias[static_cast<std::size_t>(i)], height, padded, at + i * height);
      }
      block.bias = at;
      at += out_padded;
    }
    if (expert.norm_weight.data != nullptr) {
      to_float(expert.norm_weight, op.in_features, in_padded, at);
      to_float(expert.norm_bias, op.in_features, in_padded, at + in_padded);
      block.norm_weight = at;
      block.norm_bias = at + in_padded;
      at += 2 * in_padded;
    }
    experts.push_back(block);
  }
  return experts;
}

void expert_linear(const Pool& pool, const ExpertLinear& op) {
  thread_local BlockMemory memory;
  const Kernels& level = level_of(op);
  const std::vector<LinearBlock> experts = whole_blocks(pool, op, memory);
  thread_local std::vector<LinearBlock> kept;
  std::vector<LinearBlock>& tasks = kept;  // of this thread, in whichever one a task runs
  tasks.clear();
  plan(pool, level.linear, op, experts, &tasks);
  share(pool, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const LinearBlock& task = tasks[static_cast<std::size_t>(i)];
    level.linear.block(task, task_scratch().at_least(level.linear.scratch(task)));
  });
  memory.packed.keep_at_most(kMostPacked);
}

int64_t product_loop(const Pool& pool, const ExpertLinear& op, int64_t repeats) {
  const Kernels& level = level_of(op);
  const uint32_t* const panels = panels_of(op.experts[0].packed[0]);
  LinearBlock block{};
  block.x = op.x;
  block.x_stride = op.x_stride;
  block.count = op.experts[0].end;
  block.in_features = op.in_features;
  block.out_features = op.out_features;
  block.parts = &panels;
  block.part_panels = block.panel_end = panel_count(op.out_features);
  std::atomic<int64_t> results{0};
  share(pool, pool.threads, [&](int64_t) {
    Scratch scratch;
    results += level.product_loop(block, repeats, scratch.at_least(level.product_scratch(block)));
  });
  return results * repeats * 2 * op.in_features;
}

}  // namespace beit3_fast::cpu
