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
bool wants_layer_rest(const Pool& pool, const LinearKernels& level, int64_t rows);

void layer_rest(const Pool& pool, const LayerRest& op);

// The most rows that all products of a layer meet at once.
int64_t most_rows(const LinearKernels& level, int64_t width, int64_t hidden);

// Rows in strips, `apart` elements from each other.
struct Strips {
  void* data;
  int64_t apart;
};

// A block that reads its rows from strips, whose statistics may be null, or writes them to some.
void read_strips(LinearBlock& block, const Strips& x, const RowStatistics* statistics);
void write_strips(LinearBlock& block, const Strips& out, RowStatistics* statistics);

void rows_to_strips(DType dtype, const void* rows, int64_t stride, int64_t count, int64_t width,
                    const Strips& strips);
void strips_to_rows(DType dtype, const Strips& strips, int64_t count, int64_t width, void* rows,
                    int64_t stride);

// The same for some rows on this thread: blocks of them with their weights, of which `project` says
// what x is, and the residual in strips, whose place the result takes. `statistics`: where those
// of the result go, or null.
void rest_of_block(const LinearKernels& level, DType dtype, LinearBlock project, LinearBlock first,
                   LinearBlock second, const Strips& a, RowStatistics* statistics);

}  // namespace beit3_fast::cpu
