#include "layer_rest.h"

#include <algorithm>
#include <cstring>

#include "packed_weight.h"

namespace beit3_fast::cpu {
namespace {

// Fewer rows on a thread than this read weights for longer than they multiply.
constexpr int64_t kRowsPerThread = 128;

// How many rows a thread multiplies in the time in which it reads the weights of another expert.
constexpr int64_t kRowsOfReading = 64;

// Rows [first, first + count), all of one expert in each product.
struct Rows {
  int64_t first;
  int64_t count;
};

// Shares of all rows that take the threads equally long, one behind the other: few of them reach
// into the rows of two experts, so no more weights are read than must be. In each share blocks of
// one expert, of at most `most` rows. `edges` are those of the experts, ascending.
std::vector<std::vector<Rows>> cut(const std::vector<int64_t>& edges, int64_t most, int64_t threads,
                                   int64_t grain) {
  std::vector<std::vector<Rows>> shares(static_cast<std::size_t>(threads));
  const auto experts = static_cast<int64_t>(edges.size()) - 1;
  const int64_t reading = kRowsOfReading / grain * grain;
  const int64_t total = edges.back() + (experts - 1) * reading;
  for (int64_t thread = 0; thread < threads; ++thread) {
    for (int64_t e = 0; e < experts; ++e) {
      const auto inside = [&](int64_t part) {
        return std::clamp(first_row(total, grain, part, threads) - e * reading,
                          edges[static_cast<std::size_t>(e)],
                          edges[static_cast<std::size_t>(e + 1)]);
      };
      const int64_t begin = inside(thread), count = inside(thread + 1) - begin;
      const int64_t parts = ceil_div(count, most);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = first_row(count, grain, part, parts);
        const int64_t to = first_row(count, grain, part + 1, parts);
        if (from < to) {
          shares[static_cast<std::size_t>(thread)].push_back({begin + from, to - from});
        }
      }
    }
  }
  return shares;
}

// Of the expert to which the rows belong.
LinearBlock block_of(const std::vector<LinearBlock>& experts, const Rows& rows) {
  const auto* expert = &experts[0];
  for (const LinearBlock& other : experts) {
    if (other.first <= rows.first) expert = &other;
  }
  LinearBlock block = *expert;
  block.first = 0;
  block.count = rows.count;
  return block;
}

// Where a matrix lies, in bytes: rows and strips so far apart.
struct Place {
  void* data;
  int64_t stride;
  int64_t strip;
};

// Rows of `width` bytes, piece by piece of at most `piece`.
void copy_rows(const Place& from, const Place& to, int64_t count, int64_t width, int64_t piece) {
  for (int64_t r = 0; r < count; ++r) {
    const auto* source = static_cast<const char*>(from.data) + r * from.stride;
    auto* target = static_cast<char*>(to.data) + r * to.stride;
    for (int64_t at = 0; at < width; at += piece, source += from.strip, target += to.strip) {
      std::memcpy(target, source, static_cast<std::size_t>(std::min(piece, width - at)));
    }
  }
}

}  // namespace

void read_strips(LinearBlock& block, const Strips& x, const RowStatistics* statistics) {
  block.x = x.data;
  block.x_stride = kStrip;
  block.x_strip = x.apart;
  block.x_statistics = statistics;
}

void write_strips(LinearBlock& block, const Strips& out, RowStatistics* statistics) {
  block.out = out.data;
  block.out_stride = kStrip;
  block.out_strip = out.apart;
  block.statistics = statistics;
}

void rows_to_strips(DType dtype, const void* rows, int64_t stride, int64_t count, int64_t width,
                    const Strips& strips) {
  const int64_t size = bytes_of(dtype), piece = kStrip * size;
  copy_rows({const_cast<void*>(rows), stride * size, piece},
            {strips.data, piece, strips.apart * size}, count, width * size, piece);
}

void strips_to_rows(DType dtype, const Strips& strips, int64_t count, int64_t width, void* rows,
                    int64_t stride) {
  const int64_t size = bytes_of(dtype), piece = kStrip * size;
  copy_rows({strips.data, piece, strips.apart * size}, {rows, stride * size, piece}, count,
            width * size, piece);
}

void rest_of_block(const LinearKernels& level, DType dtype, LinearBlock project, LinearBlock first,
                   LinearBlock second, const Strips& a, RowStatistics* statistics) {
  thread_local Scratch between, measured;
  const int64_t rows = project.count;
  auto* const attended = static_cast<RowStatistics*>(
      measured.at_least(2 * rows * static_cast<int64_t>(sizeof(RowStatistics))));
  RowStatistics* const hidden = attended + rows;
  const int64_t strip = kStrip * rows;
  const Strips h{between.at_least(ceil_div(first.out_features, kStrip) * strip * bytes_of(dtype)),
                 strip};
  const auto run = [&](const LinearBlock& block) {
    level.block(block, task_scratch().at_least(level.scratch(block)));
  };
  // Both results are added to the residual where it lies.
  for (LinearBlock* block : {&project, &second}) {
    block->residual = a.data;
    block->residual_stride = kStrip;
    block->residual_strip = a.apart;
  }
  write_strips(project, a, attended);
  run(project);
  read_strips(first, a, attended);
  write_strips(first, h, hidden);
  run(first);
  read_strips(second, h, hidden);
  write_strips(second, a, statistics);
  run(second);
}

int64_t most_rows(const LinearKernels& level, int64_t width, int64_t hidden) {
  return std::min(level.most_rows(width), level.most_rows(hidden));
}

bool wants_layer_rest(const Pool& pool, const LinearKernels& level, int64_t rows) {
  return level.high_blocks && rows >= kRowsPerThread * pool.threads;
}

void layer_rest(const Pool& pool, const LayerRest& op) {
  thread_local BlockMemory memories[3];
  const LinearKernels& level = level_of(op.first).linear;
  const std::vector<LinearBlock> project = whole_blocks(pool, op.project, memories[0]);
  const std::vector<LinearBlock> first = whole_blocks(pool, op.first, memories[1]);
  const std::vector<LinearBlock> second = whole_blocks(pool, op.second, memories[2]);

  std::vector<int64_t> edges;
  for (const auto* experts : {&project, &first}) {
    for (const LinearBlock& expert : *experts) {
      edges.push_back(expert.first);
      edges.push_back(expert.first + expert.count);
    }
  }
  std::sort(edges.begin(), edges.end());
  edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
  const int64_t width = op.project.out_features, hidden = op.first.out_features;
  const std::vector<std::vector<Rows>> shares =
      cut(edges, most_rows(level, width, hidden), pool.threads, level.tile_rows);

  const auto compute = [&](const Rows& rows) {
    thread_local Scratch sums;
    LinearBlock block = block_of(project, rows);
    void* const y = second[0].out;
    const DType dtype = op.project.dtype;
    const auto from_first = [&](const void* data, int64_t stride) {
      return const_cast<void*>(elements_on(data, rows.first * stride, dtype));
    };
    const Strips a{sums.at_least(ceil_div(width, kStrip) * kStrip * rows.count * bytes_of(dtype)),
                   kStrip * rows.count};
    rows_to_strips(dtype, from_first(block.residual, block.residual_stride), block.residual_stride,
                   rows.count, width, a);
    block.x = from_first(block.x, block.x_stride);
    if (block.x_statistics != nullptr) block.x_statistics += rows.first;
    RowStatistics* const left = second[0].statistics;
    rest_of_block(level, dtype, block, block_of(first, rows), block_of(second, rows), a,
                  left == nullptr ? nullptr : left + rows.first);
    const int64_t y_stride = second[0].out_stride;
    strips_to_rows(dtype, a, rows.count, width, from_first(y, y_stride), y_stride);
  };
  share(pool, pool.threads, [&](int64_t i) {
    for (const Rows& rows : shares[static_cast<std::size_t>(i)]) compute(rows);
  });
}

}  // namespace beit3_fast::cpu
