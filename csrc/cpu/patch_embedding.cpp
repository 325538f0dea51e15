#include "patch_embedding.h"

#include <algorithm>
#include <vector>

#include "expert_linear.h"
#include "isa.h"
#include "packed_weight.h"

namespace beit3_fast::cpu {
namespace {

const char* at(const void* base, int64_t elements, int64_t bytes) {
  return static_cast<const char*>(base) + elements * bytes;
}

// The pixels of one patch side by side, as a row of the weight has them.
void gather_patch(const PatchEmbedding& op, int64_t sample, int64_t patch, int64_t bytes,
                  char* to) {
  const int64_t columns = op.width / op.patch;
  const int64_t top = patch / columns * op.patch, left = patch % columns * op.patch;
  const auto line = static_cast<std::size_t>(op.patch * bytes);
  for (int64_t channel = 0; channel < op.channels; ++channel) {
    for (int64_t y = 0; y < op.patch; ++y, to += line) {
      const int64_t pixel =
          ((sample * op.channels + channel) * op.height + top + y) * op.width + left;
      std::memcpy(to, at(op.images, pixel, bytes), line);
    }
  }
}

// A row that no product is needed for: a token and its position.
void put_token(const PatchEmbedding& op, const Parameter& token, int64_t place, int64_t row) {
  for (int64_t i = 0; i < op.out_features; ++i) {
    float value = load_element(token.dtype, token.data, i);
    if (op.words != nullptr) store_element(op.dtype, op.words, row * op.out_features + i, value);
    if (op.positions != nullptr) {
      value += load_element(op.dtype, op.positions, place * op.out_features + i);
    }
    store_element(op.dtype, op.out, row * op.out_features + i, value);
  }
}

}  // namespace

void patch_embedding(const Pool& pool, const PatchEmbedding& op) {
  const Kernels& level = kernels(op.dtype);
  const int64_t bytes = bytes_of(op.dtype);
  const int64_t patches = (op.height / op.patch) * (op.width / op.patch);
  const int64_t depth = op.channels * op.patch * op.patch;
  const int64_t padded = panel_count(op.out_features) * kPanel;
  const uint32_t* const panels = panels_of(op.packed);
  thread_local Scratch parameters;
  float* bias = nullptr;
  if (op.bias.data != nullptr) {
    bias = static_cast<float*>(parameters.at_least(padded * static_cast<int64_t>(sizeof(float))));
    to_float(op.bias, op.out_features, padded, bias);
  }
  const int64_t parts = std::max(
      ceil_div(patches, level.linear.most_rows(depth)),
      std::min(ceil_div(pool.threads, op.batch), std::max<int64_t>(1, patches / kFewRows)));
  share(pool, op.batch * parts, [&](int64_t task) {
    thread_local Scratch gathered;
    thread_local std::vector<int64_t> seen;
    const int64_t sample = task / parts, part = task % parts;
    const int64_t first = patches * part / parts, last = patches * (part + 1) / parts;
    const int64_t row = sample * (patches + 1) + 1 + first;
    if (part == 0) put_token(op, op.cls_token, 0, row - 1);

    seen.clear();
    auto* const x =
        static_cast<char*>(gathered.at_least(std::max<int64_t>(last - first, 1) * depth * bytes));
    for (int64_t i = 0; i < last - first; ++i) {
      if (op.masked != nullptr && op.masked[sample * patches + first + i] != 0) {
        put_token(op, op.mask_token, 1 + first + i, row + i);
        continue;
      }
      gather_patch(op, sample, first + i, bytes, x + i * depth * bytes);
      seen.push_back(i);
    }
    if (seen.empty()) return;

    LinearBlock block{};
    block.x = x;
    block.x_stride = depth;
    if (op.positions != nullptr) {
      block.residual = at(op.positions, (1 + first) * op.out_features, bytes);
      block.residual_stride = op.out_features;
    }
    block.out = static_cast<char*>(op.out) + row * op.out_features * bytes;
    if (op.words != nullptr) {
      block.bare = static_cast<char*>(op.words) + row * op.out_features * bytes;
    }
    block.out_stride = op.out_features;
    block.rows = seen.data();
    block.count = static_cast<int64_t>(seen.size());
    block.in_features = depth;
    block.out_features = op.out_features;
    block.parts = &panels;
    block.part_panels = block.panel_end = panel_count(op.out_features);
    block.bias = bias;
    level.linear.block(block, task_scratch().at_least(level.linear.scratch(block)));
  });
}

}  // namespace beit3_fast::cpu
