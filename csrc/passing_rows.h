// Memory of the rows that operators return, and of those between their kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/huge_pages.h"

namespace beit3_fast::operands {

// Bytes of rows that are worth huge pages: of a result, which may be kept for long and of which
// there may be many, and of rows that are gone before the call returns.
constexpr int64_t kPassingFrom = cpu::kHugePage / 2;
constexpr int64_t kBetweenFrom = cpu::kHugePage / 32;

// [rows, columns] like x, where there are at least `from` bytes in memory that earlier ones have
// left.
inline torch::stable::Tensor rows_like(const torch::stable::Tensor& x, int64_t rows,
                                       int64_t columns, int64_t from = kPassingFrom) {
  const int64_t shape[] = {rows, columns}, strides[] = {columns, 1};
  const int64_t bytes = rows * columns * static_cast<int64_t>(x.element_size());
  if (bytes < from) return torch::stable::new_empty(x, {shape, 2});
  return torch::stable::from_blob(cpu::take_passing(bytes), {shape, 2}, {strides, 2}, x.device(),
                                  x.scalar_type(), cpu::give_passing);
}

// The same for rows between two kernels of a call.
inline torch::stable::Tensor rows_between(const torch::stable::Tensor& x, int64_t rows,
                                          int64_t columns) {
  return rows_like(x, rows, columns, kBetweenFrom);
}

}  // namespace beit3_fast::operands
