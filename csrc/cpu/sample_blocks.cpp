#include "sample_blocks.h"

#include <algorithm>
#include <cstdlib>

namespace beit3_fast::cpu {
namespace {

// How much longer than on average a thread may work: what is gained otherwise.
constexpr double kEvenly = 1.05;

// Attention among fewer tokens takes as long as among so many; and how much longer an operation of
// it takes than one of a product.
constexpr int64_t kFewTokens = 48, kAttention = 4;

// How long a layer of one sample takes, in 4 C operations of a product.
double work_of(int64_t tokens, int64_t width) {
  if (tokens == 0) return 0.0;
  const int64_t met = std::max(tokens, kFewTokens);
  return static_cast<double>(6 * width * tokens + kAttention * met * met);
}

// The bounds of the samples in the modality that has all rows; null if both have some.
const int32_t* bounds_of(const SharedAttention& layout) {
  if (layout.cu_text[layout.batch] == 0) return layout.cu_vision;
  return layout.cu_vision[layout.batch] == 0 ? layout.cu_text : nullptr;
}

// Samples [begin, end) in blocks of at most `most` rows, or of one sample, about equally high.
std::vector<SampleBlock> cut(const int32_t* bounds, int64_t begin, int64_t end, int64_t most) {
  const int64_t first = bounds[begin], rows = bounds[end] - first;
  const int64_t parts = std::max(int64_t{1}, ceil_div(rows, most));
  std::vector<SampleBlock> blocks;
  for (int64_t s = begin; s < end;) {
    const int64_t from = s, row = bounds[s];
    const int64_t part = std::min(static_cast<int64_t>(blocks.size()) + 1, parts);
    const int64_t goal = first + rows * part / parts;
    for (++s; s < end && bounds[s + 1] - row <= most; ++s) {
      if (std::abs(bounds[s + 1] - goal) > std::abs(bounds[s] - goal)) break;
    }
    if (bounds[s] > row) blocks.push_back({from, s - from, row, bounds[s] - row});
  }
  return blocks;
}

template <class T>
T* array_of(Scratch& scratch, int64_t count) {
  return static_cast<T*>(scratch.at_least(count * static_cast<int64_t>(sizeof(T))));
}

// The products of a layer for all rows, and what they refer to.
struct Prepared {
  BlockMemory memories[4];
  LinearBlock project, out, first, second;
};

// Computes blocks, in memory of its thread.
class Blocks {
 public:
  Blocks(const LayersBySample& op, const std::vector<Prepared>& layers)
      : op_(op),
        layers_(layers),
        dtype_(op.layers[0]->project.dtype),
        int8_(op.layers[0]->project.int8),
        level_(level_of(op.layers[0]->project).linear),
        width_(layers[0].project.in_features),
        most_(most_rows(level_, width_, layers[0].first.out_features)) {}

  // All layers of consecutive blocks.
  void compute(const std::vector<SampleBlock>& blocks) const {
    if (blocks.empty()) return;
    thread_local Scratch memory;
    const int64_t first = blocks.front().first_row;
    const int64_t count = blocks.back().first_row + blocks.back().rows - first;
    auto* const statistics = array_of<RowStatistics>(memory, count);
    std::fill_n(statistics, count, kUnmeasured);
    for (const SampleBlock& block : blocks) {
      rows_to_strips(dtype_, elements_on(op_.x, block.first_row * op_.x_stride, dtype_),
                     op_.x_stride, block.rows, width_, passing(block));
    }
    for (std::size_t layer = 0; layer < op_.layers.size(); ++layer) {
      for (const SampleBlock& block : blocks) {
        compute(layers_[layer], block, statistics + block.first_row - first);
      }
    }
    for (const SampleBlock& block : blocks) {
      void* const out =
          const_cast<void*>(elements_on(op_.out, block.first_row * op_.out_stride, dtype_));
      strips_to_rows(dtype_, passing(block), block.rows, width_, out, op_.out_stride);
    }
  }

 private:
  // What goes from layer to layer.
  Strips passing(const SampleBlock& block) const {
    return {const_cast<void*>(elements_on(op_.between, block.first_row * width_, dtype_)),
            kStrip * block.rows};
  }

  // A layer of a block, by statistics of its rows, which become those of the results.
  void compute(const Prepared& layer, const SampleBlock& block, RowStatistics* statistics) const {
    thread_local Scratch projected, attended, memory;
    const Strips x = passing(block);
    const int64_t size = width_ * block.rows;
    void* const qkv = projected.at_least(3 * size * bytes_of(dtype_));
    void* const o = attended.at_least(size * bytes_of(dtype_));
    // int8 has a level of its own, and with it another order of additions.
    RowStatistics* const measured = int8_ ? nullptr : array_of<RowStatistics>(memory, block.rows);

    by_pieces(block, [&](int64_t from, int64_t count) {
      LinearBlock product = rows_of(layer.project, count);
      read_strips(product, {on(x.data, from), x.apart}, statistics + from);
      write_strips(product, {on(qkv, from), x.apart}, nullptr);
      level_.block(product, task_scratch().at_least(level_.scratch(product)));
    });
    attend(block, qkv, o, measured);
    by_pieces(block, [&](int64_t from, int64_t count) {
      LinearBlock product = rows_of(layer.out, count);
      read_strips(product, {on(o, from), x.apart}, measured == nullptr ? nullptr : measured + from);
      rest_of_block(level_, dtype_, product, rows_of(layer.first, count),
                    rows_of(layer.second, count), {on(x.data, from), x.apart}, statistics + from);
    });
  }

  void attend(const SampleBlock& block, const void* qkv, void* o, RowStatistics* measured) const {
    thread_local std::vector<int32_t> own, none;
    const bool vision = op_.layout.cu_text[op_.layout.batch] == 0;
    const int32_t* const bounds = bounds_of(op_.layout) + block.first_sample;
    own.clear();
    for (int64_t s = 0; s <= block.samples; ++s) own.push_back(bounds[s] - bounds[0]);
    none.assign(own.size(), 0);
    SharedAttention call = op_.layout;
    call.batch = block.samples;
    call.cu_vision = call.cu_vision_q = vision ? own.data() : none.data();
    call.cu_text = call.cu_text_q = vision ? none.data() : own.data();
    call.q = qkv;
    call.k = elements_on(qkv, width_ * block.rows, dtype_);
    call.v = elements_on(qkv, 2 * width_ * block.rows, dtype_);
    call.out = o;
    call.q_stride = call.k_stride = call.v_stride = call.out_stride = call.head_dim = kStrip;
    call.q_head = call.key_head = call.out_head = kStrip * block.rows;
    call.statistics = measured;
    const Pool alone{1, nullptr};
    shared_attention(alone, call);
  }

  // run(from, count) for as many rows as a product meets at once, until all have had their turn.
  template <class Run>
  void by_pieces(const SampleBlock& block, const Run& run) const {
    const int64_t pieces = ceil_div(block.rows, most_);
    const auto edge = [&](int64_t piece) {
      return first_row(block.rows, level_.tile_rows, piece, pieces);
    };
    for (int64_t piece = 0; piece < pieces; ++piece) {
      run(edge(piece), edge(piece + 1) - edge(piece));
    }
  }

  static LinearBlock rows_of(const LinearBlock& whole, int64_t count) {
    LinearBlock block = whole;
    block.first = 0;
    block.count = count;
    return block;
  }

  // Row `row` of a matrix in strips.
  void* on(const void* strips, int64_t row) const {
    return const_cast<void*>(elements_on(strips, kStrip * row, dtype_));
  }

  const LayersBySample& op_;
  const std::vector<Prepared>& layers_;
  const DType dtype_;
  const bool int8_;
  const LinearKernels& level_;
  const int64_t width_;
  const int64_t most_;
};

}  // namespace

std::vector<std::vector<SampleBlock>> sample_blocks(const Pool& pool, const LinearKernels& level,
                                                    const SharedAttention& layout, int64_t width,
                                                    int64_t hidden) {
  const int32_t* const bounds = bounds_of(layout);
  if (bounds == nullptr || layout.seen != nullptr || layout.positions_q != nullptr ||
      width != layout.num_heads * kStrip || !wants_layer_rest(pool, level, bounds[layout.batch])) {
    return {};
  }
  double total = 0.0;
  for (int64_t s = 0; s < layout.batch; ++s) total += work_of(bounds[s + 1] - bounds[s], width);

  const double share = total / static_cast<double>(pool.threads);
  std::vector<std::vector<SampleBlock>> blocks;
  int64_t s = 0;
  double done = 0.0;
  for (int64_t thread = 0; thread < pool.threads; ++thread) {
    const int64_t begin = s;
    const double before = done, goal = share * static_cast<double>(thread + 1);
    for (; s < layout.batch; ++s) {
      const double own = work_of(bounds[s + 1] - bounds[s], width);
      if (done + own / 2 > goal) break;
      done += own;
    }
    if (done - before > kEvenly * share) return {};
    blocks.push_back(cut(bounds, begin, s, most_rows(level, width, hidden)));
  }
  return blocks;
}

void layers_by_sample(const Pool& pool, const std::vector<std::vector<SampleBlock>>& blocks,
                      const LayersBySample& op) {
  thread_local std::vector<Prepared> kept;
  std::vector<Prepared>& layers = kept;  // of this thread, in whichever one a task runs
  if (layers.size() < op.layers.size()) layers.resize(op.layers.size());
  for (std::size_t i = 0; i < op.layers.size(); ++i) {
    const auto& [project, rest] = *op.layers[i];
    Prepared& own = layers[i];
    own.project = whole_blocks(pool, project, own.memories[0])[0];
    own.out = whole_blocks(pool, rest.project, own.memories[1])[0];
    own.first = whole_blocks(pool, rest.first, own.memories[2])[0];
    own.second = whole_blocks(pool, rest.second, own.memories[3])[0];
  }
  const Blocks run(op, layers);
  share(pool, pool.threads, [&](int64_t i) { run.compute(blocks[static_cast<std::size_t>(i)]); });
}

}  // namespace beit3_fast::cpu
