// What the bindings do with a LayerNorm of rows behind the layers.
#pragma once

#include <vector>

#include "cpu/rows.h"
#include "linear_operands.h"
#include "passing_rows.h"

namespace beit3_fast::operands {

// Of each expert, and the bounds of their rows.
struct NormParameters {
  const std::vector<Tensor>& weights;
  const std::vector<Tensor>& biases;
  const std::vector<double>& eps;
  const std::vector<int64_t>& bounds;
  // The names of these lists.
  const char* weights_name = "weights";
  const char* biases_name = "biases";
  const char* bounds_name = "bounds";
};

// The experts of `rows` rows like x [.., C].
inline std::vector<cpu::NormExpert> norm_experts(const Tensor& x, int64_t rows,
                                                 const NormParameters& own, const char* op) {
  const std::size_t count = own.weights.size();
  require(count > 0 && own.biases.size() == count && own.eps.size() == count, op,
          ": expected a weight, a bias and an eps for each expert of a LayerNorm, got ", count,
          ", ", own.biases.size(), " and ", own.eps.size());
  require_bounds(own.bounds, count, op);
  require(own.bounds[count] == rows, op, ": ", own.bounds_name, " end at ", own.bounds[count],
          " but there are ", rows, " rows");
  std::vector<cpu::NormExpert> experts(count);
  for (std::size_t e = 0; e < count; ++e) {
    cpu::NormExpert& expert = experts[e];
    expert.weight = parameter_of(own.weights[e], x.size(1), op, Entry{own.weights_name, e});
    expert.bias = parameter_of(own.biases[e], x.size(1), op, Entry{own.biases_name, e});
    expert.eps = eps_of(own.eps[e], op);
    expert.begin = own.bounds[e];
    expert.end = own.bounds[e + 1];
  }
  return experts;
}

// Rows x [R, C], each normalised by its expert.
inline Tensor layer_norm(const Tensor& x, std::vector<cpu::NormExpert> experts, const char* op) {
  Tensor out = rows_like(x, x.size(0), x.size(1));
  if (x.size(0) == 0) return out;
  cpu::LayerNorm call;
  call.dtype = dtype_of(x, op, "x");
  call.x = x.const_data_ptr();
  call.x_stride = x.stride(0);
  call.width = x.size(1);
  call.experts = std::move(experts);
  call.out = out.mutable_data_ptr();
  cpu::layer_norm(torch_pool(), call);
  return out;
}

}  // namespace beit3_fast::operands
