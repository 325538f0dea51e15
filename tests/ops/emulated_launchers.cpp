// The launchers of csrc/cuda/ in front of the emulated kernels of tests/cuda/.

#include <cstdint>

#include "cuda/decode_attention.h"
#include "cuda/expert_linear.h"
#include "cuda/head_top_k.h"
#include "cuda/linear_tiles.h"
#include "cuda/row_statistics.h"
#include "cuda/shared_attention.h"

using namespace beit3_fast::cuda;

extern "C" {
const char* emulate_expert_linear(const ExpertLinear* op, const LinearPlan* plan, int clusters,
                                  int order, uint64_t seed);
const char* emulate_row_statistics(const RowStatistics* op, int blocks, int order, uint64_t seed);
const char* emulate_shared_attention(const SharedAttention* op, int processors, int portable,
                                     int order, uint64_t seed);
const char* emulate_decode_attention(const DecodeAttention* op, int processors, int order,
                                     uint64_t seed);
const char* emulate_head_top_k(const HeadTopK* op, int order, uint64_t seed);
}

namespace beit3_fast::cuda {

const char* row_statistics(const RowStatistics& op, CUstream_st*) {
  if (const char* obstacle = row_statistics_obstacle(op)) return obstacle;
  return emulate_row_statistics(&op, 2, 2, 1);
}

// The kernels are asked again where they are run.
const char* expert_linear_obstacle(const ExpertLinear&) { return nullptr; }
const char* shared_attention_obstacle(const SharedAttention&) { return nullptr; }
const char* decode_attention_obstacle(const DecodeAttention&) { return nullptr; }
const char* head_top_k_obstacle(const HeadTopK&) { return nullptr; }

const char* expert_linear(const ExpertLinear& op, CUstream_st*) {
  const LinearPlan plan = plan_for(op, 8);
  return emulate_expert_linear(&op, &plan, 3, 2, 1);
}

const char* shared_attention(const SharedAttention& op, CUstream_st*) {
  return emulate_shared_attention(&op, 3, 0, 2, 1);
}

const char* decode_attention(const DecodeAttention& op, CUstream_st*) {
  return emulate_decode_attention(&op, 3, 2, 1);
}

const char* head_top_k(const HeadTopK& op, CUstream_st*) {
  return op.num_rows == 0 ? nullptr : emulate_head_top_k(&op, 2, 1);
}

}  // namespace beit3_fast::cuda
