// What follows attention in a layer: its projection and the feed-forward network.
#pragma once

#include "expert_linear.h"

namespace beit3_fast::cpu {

// y = second(first(a)) + a with a = project(x) + residual. Of the three, `project` says what x and
// the residual are and `second` where y goes; what lies between has no memory of its own.
struct LayerRest {
  ExpertLinear project;
  ExpertLinear first;
  ExpertLinear second;
};

// Whether `layer_rest` is the faster way for so many rows: every thread takes some of them through
// all three products, and reads all weights for it.
bool wants_layer_rest(const Pool& pool, const ExpertLinear& op, int64_t rows);

void layer_rest(const Pool& pool, const LayerRest& op);

}  // namespace beit3_fast::cpu
