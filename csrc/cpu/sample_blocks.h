// Layers of an encoder, by samples: no sample needs another, so a thread takes its own through all
// layers, and waits for nobody in between.
#pragma once

#include <vector>

#include "layer_rest.h"
#include "shared_attention.h"

namespace beit3_fast::cpu {

// Of one layer; `project` makes queries, keys and values side by side. What x, the residual and the
// results are is said elsewhere.
struct LayerProducts {
  ExpertLinear project;
  LayerRest rest;
};

// Consecutive samples, which are consecutive rows of x.
struct SampleBlock {
  int64_t first_sample;
  int64_t samples;
  int64_t first_row;
  int64_t rows;
};

// Each thread's samples, in blocks whose rows a product meets at once. None where that is not the
// faster way: where threads would not be about equally busy or have few rows, heads are no strips,
// or a sample has rows of both modalities. `level` is that of the products, `hidden` the columns
// between the two of the feed-forward network.
std::vector<std::vector<SampleBlock>> sample_blocks(const Pool& pool, const LinearKernels& level,
                                                    const SharedAttention& layout, int64_t width,
                                                    int64_t hidden);

// Rows [.., C], all of one expert, that become those of the last layer. Of the layout only samples,
// heads, scale and mask count. `between` is room for as many rows.
struct LayersBySample {
  std::vector<const LayerProducts*> layers;
  SharedAttention layout;
  const void* x = nullptr;
  int64_t x_stride = 0;
  void* between = nullptr;
  void* out = nullptr;
  int64_t out_stride = 0;
};

void layers_by_sample(const Pool& pool, const std::vector<std::vector<SampleBlock>>& blocks,
                      const LayersBySample& op);

}  // namespace beit3_fast::cpu
