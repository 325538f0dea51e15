#include "rows.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace beit3_fast::cpu {
namespace {

// Rows of a task. Fewer are not worth another thread.
constexpr int64_t kTaskRows = 64;
// Sums over rows that are added up one after the other, whoever formed them.
constexpr int64_t kMostSums = 64;

}  // namespace

void layer_norm(const Pool& pool, const LayerNorm& op) {
  thread_local Scratch parameters;
  const Kernels& level = kernels(op.dtype);
  const int64_t padded = ceil_div(op.width, kChunk) * kChunk;
  const auto count = static_cast<int64_t>(op.experts.size());
  auto* at = static_cast<float*>(
      parameters.at_least(2 * count * padded * static_cast<int64_t>(sizeof(float))));
  thread_local std::vector<NormBlock> kept;
  std::vector<NormBlock>& tasks = kept;  // of this thread, in whichever one a task runs
  tasks.clear();
  for (const NormExpert& expert : op.experts) {
    NormBlock block{};
    block.x_stride = op.x_stride;
    block.out_stride = block.width = op.width;
    block.eps = expert.eps;
    block.weight = at;
    block.bias = at + padded;
    to_float(expert.weight, op.width, padded, at);
    to_float(expert.bias, op.width, padded, at + padded);
    at += 2 * padded;
    for (int64_t row = expert.begin; row < expert.end; row += kTaskRows) {
      block.x = elements_on(op.x, row * op.x_stride, op.dtype);
      block.out = const_cast<void*>(elements_on(op.out, row * op.width, op.dtype));
      block.count = std::min(kTaskRows, expert.end - row);
      tasks.push_back(block);
    }
  }
  share(pool, static_cast<int64_t>(tasks.size()),
        [&](int64_t i) { level.layer_norm(tasks[static_cast<std::size_t>(i)]); });
}

void layer_norm_gradients(const Pool& pool, const LayerNormGradients& op) {
  thread_local Scratch kept;
  const Kernels& level = kernels(op.dtype);
  const int64_t padded = ceil_div(op.width, kChunk) * kChunk;
  const int64_t task_rows = std::max(kTaskRows, ceil_div(op.rows, kMostSums));
  const int64_t tasks = ceil_div(op.rows, task_rows);
  auto* const weight = static_cast<float*>(
      kept.at_least((1 + 2 * tasks) * padded * static_cast<int64_t>(sizeof(float))));
  float* const sums = weight + padded;
  to_float(op.weight, op.width, padded, weight);
  share(pool, tasks, [&](int64_t task) {
    const int64_t first = task * task_rows;
    NormGradientsBlock block{};
    block.x = elements_on(op.x, first * op.x_stride, op.dtype);
    block.x_stride = op.x_stride;
    block.grad = elements_on(op.grad, first * op.grad_stride, op.dtype);
    block.grad_stride = op.grad_stride;
    block.x_grad = const_cast<void*>(elements_on(op.x_grad, first * op.width, op.dtype));
    block.x_grad_stride = block.width = op.width;
    block.count = std::min(task_rows, op.rows - first);
    block.weight = weight;
    block.weight_grad = sums + 2 * task * padded;
    block.bias_grad = block.weight_grad + padded;
    block.eps = op.eps;
    level.layer_norm_gradients(block);
  });
  for (int64_t i = 0; i < op.width; ++i) {
    float whole[2] = {};
    for (int64_t task = 0; task < tasks; ++task) {
      whole[0] += sums[2 * task * padded + i];
      whole[1] += sums[(2 * task + 1) * padded + i];
    }
    store_element(op.weight.dtype, op.weight_grad, i, whole[0]);
    store_element(op.weight.dtype, op.bias_grad, i, whole[1]);
  }
}

void transpose(const Pool& pool, const Transposition& op) {
  const Kernels& level = kernels(op.dtype);
  share(pool, ceil_div(op.columns, kPanel), [&](int64_t panel) {
    level.transpose(op.x, op.x_stride, op.rows, op.columns, panel * kPanel, op.out, op.rows);
  });
}

void unpack_rows(const Pool& pool, const UnpackRows& op) {
  thread_local std::vector<int64_t> kept;
  std::vector<int64_t>& sources = kept;
  sources.assign(static_cast<std::size_t>(op.count), -1);
  for (int64_t r = 0; r < op.rows; ++r) sources[static_cast<std::size_t>(op.places[r])] = r;
  const auto bytes = static_cast<std::size_t>(op.bytes);
  share(pool, ceil_div(op.count, kTaskRows), [&](int64_t task) {
    const int64_t end = std::min(op.count, (task + 1) * kTaskRows);
    for (int64_t i = task * kTaskRows; i < end; ++i) {
      auto* const to = static_cast<char*>(op.out) + i * op.bytes;
      const int64_t row = sources[static_cast<std::size_t>(i)];
      if (row < 0) {
        std::memset(to, 0, bytes);
      } else {
        std::memcpy(to, static_cast<const char*>(op.x) + row * op.x_stride, bytes);
      }
    }
  });
}

}  // namespace beit3_fast::cpu
