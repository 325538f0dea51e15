// Grouped y = activation(LN(x) W^T + b) + residual: rows of expert e meet the weights of expert e.
#pragma once

#include <algorithm>
#include <vector>

#include "elements.h"
#include "kernels.h"
#include "parallel.h"

namespace beit3_fast::cpu {

// A block that reuses each panel for fewer rows than this reads more of B than it multiplies.
constexpr int64_t kFewRows = 24;

struct Expert {
  const void* weight = nullptr;  // [O, I] of the op's dtype; read only where nothing is packed
  int64_t weight_stride = 0;
  // From pack_weight: equally high parts of the weight, whole panels where there are several.
  std::vector<const void*> packed;
  std::vector<Parameter> bias;  // none, or [O] in equally high parts
  Parameter norm_weight;        // [I]
  Parameter norm_bias;          // [I]
  int64_t begin = 0;            // its sorted rows [begin, end)
  int64_t end = 0;
};

struct ExpertLinear {
  DType dtype = DType::kFloat32;
  bool int8 = false;  // whether the packed weights are int8
  const void* x = nullptr;
  int64_t x_stride = 0;
  int64_t x_strip = kStrip;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  void* out = nullptr;  // [.., O]
  int64_t out_stride = 0;
  int64_t out_strip = kStrip;
  const int64_t* rows = nullptr;
  // By row of x and of out; of the rows of out those are left as unmeasured whose columns several
  // threads take. Null: none.
  const RowStatistics* x_statistics = nullptr;
  RowStatistics* statistics = nullptr;
  int64_t in_features = 0;
  int64_t out_features = 0;
  float eps = 0.0f;
  Activation activation = Activation::kNone;
  std::vector<Expert> experts;
};

// Arguments are trusted: the binding layer has checked shapes and ranges.
void expert_linear(const Pool& pool, const ExpertLinear& op);

const Kernels& level_of(const ExpertLinear& op);

// The first of `count` rows in block `part` of `parts`, at a multiple of `grain`.
inline int64_t first_row(int64_t count, int64_t grain, int64_t part, int64_t parts) {
  return std::min(count, ceil_div(count, grain) * part / parts * grain);
}

// What the blocks of a call refer to.
struct BlockMemory {
  Scratch parameters;
  Scratch packed;  // weights that came unpacked
  std::vector<const uint32_t*> panels;
};

// All rows of each expert that has some, against all panels.
std::vector<LinearBlock> whole_blocks(const Pool& pool, const ExpertLinear& op,
                                      BlockMemory& memory);

// Runs only the innermost loop of the products, `repeats` times on every thread, for the rows of
// one expert without norm (x, its packed weight): a ceiling. Returns floating-point operations.
int64_t product_loop(const Pool& pool, const ExpertLinear& op, int64_t repeats);

}  // namespace beit3_fast::cpu
