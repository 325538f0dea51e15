// Memory of the rows that operators return, and of those between their kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>

#include "cpu/huge_pages.h"

namespace beit3_fast::operands {

// Bytes of rows that are worth huge pages: of a result, which may be kept for long and of which
// there may be many, and of rows that are gone before the call returns.
constexpr int64_t kPassingFrom = cpu::kHugePage / 2;
constexpr int64_t kBetweenFrom = cpu::kHugePage / 32;

// A dense tensor like x, where there are at least `from` bytes in memory that earlier ones have
// left, and so many numbers there is room for.
template <std::size_t N>
torch::stable::Tensor passing_like(const torch::stable::Tensor& x, const int64_t (&shape)[N],
                                   int64_t from, int64_t room = 0) {
  int64_t strides[N];
  int64_t count = 1;
  for (std::size_t i = N; i-- > 0; count *= shape[i]) strides[i] = count;
  const int64_t bytes = count * static_cast<int64_t>(x.element_size());
  if (bytes < from) return torch::stable::new_empty(x, {shape, N});
  void* const data =
      cpu::take_passing(std::max(bytes, room * static_cast<int64_t>(x.element_size())));
  return torch::stable::from_blob(data, {shape, N}, {strides, N}, x.device(), x.scalar_type(),
                                  cpu::give_passing);
}

// A result of rows.
inline torch::stable::Tensor rows_like(const torch::stable::Tensor& x, int64_t rows,
                                       int64_t columns) {
  return passing_like(x, {rows, columns}, kPassingFrom);
}

// The same for rows between two kernels of a call, in memory that will hold rows of so many
// columns as well.
inline torch::stable::Tensor rows_between(const torch::stable::Tensor& x, int64_t rows,
                                          int64_t columns, int64_t later_columns = 0) {
  return passing_like(x, {rows, columns}, kBetweenFrom, rows * later_columns);
}

}  // namespace beit3_fast::operands
