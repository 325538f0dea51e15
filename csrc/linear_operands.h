// What the bindings of products do with their weights and vectors.
#pragma once

#include <vector>

#include "cpu/expert_linear.h"
#include "cpu/packed_weight.h"
#include "operands.h"

namespace beit3_fast::operands {

// The form of a packed weight, by the type of its tensor.
inline DType form_of(const Tensor& packed, const char* op) {
  if (packed.is_cpu() && packed.scalar_type() == ScalarType::Char) return DType::kInt8;
  return dtype_of(packed, op, "packed");
}

// Whether this is a weight [out_features, in_features] of that form, packed by this build.
inline bool holds_weight(const Tensor& packed, DType form, int64_t out_features,
                         int64_t in_features) {
  return packed.dim() == 1 && packed.is_contiguous() &&
         cpu::is_packed(packed.const_data_ptr(),
                        packed.numel() * static_cast<int64_t>(packed.element_size()), form,
                        out_features, in_features);
}

// The packed weight [out_features, in_features] of an expert, in so many equally high parts that
// follow each other in a list from `first` on.
inline void take_packed(const char* op, const std::vector<Tensor>& packed, std::size_t first,
                        std::size_t parts, DType form, DType dtype, int64_t out_features,
                        int64_t in_features, cpu::Expert& expert) {
  const auto height = out_features / static_cast<int64_t>(parts);
  require(parts == 1 ||
              (height * static_cast<int64_t>(parts) == out_features && height % cpu::kPanel == 0),
          op, ": ", out_features, " out-features in ", parts, " packed parts are no multiples of ",
          cpu::kPanel);
  expert.packed.reserve(parts);
  for (std::size_t i = first; i < first + parts; ++i) {
    const Tensor& part = packed[i];
    require(part.is_cpu() && (form == DType::kInt8 || form == dtype) && form_of(part, op) == form,
            op, ": every packed weight must be of the dtype of x, or all of int8");
    require(holds_weight(part, form, height, in_features), op, ": ", Entry{"packed", i},
            " is not a weight of shape [", height, ", ", in_features,
            "] and this dtype packed by pack_weight of this build");
    expert.packed.push_back(part.const_data_ptr());
  }
}

template <class Name>
cpu::Parameter parameter_of(const Tensor& t, int64_t size, const char* op, const Name& name) {
  require(t.is_cpu() && is_float_type(t), op, ": ", name,
          " must be a CPU tensor of float32 or bfloat16");
  require(t.dim() == 1 && t.size(0) == size && (size <= 1 || t.stride(0) == 1), op, ": ", name,
          " must be contiguous with shape [", size, "], got ", shape_of(t));
  return {t.const_data_ptr(),
          t.scalar_type() == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16};
}

// Row ranges of so many experts, one behind the other from row 0 on.
inline void require_bounds(const std::vector<int64_t>& bounds, std::size_t experts,
                           const char* op) {
  require(bounds.size() == experts + 1, op, ": bounds must have ", experts + 1, " entries, got ",
          bounds.size());
  require(bounds[0] == 0, op, ": bounds must start at 0, got ", bounds[0]);
  for (std::size_t e = 0; e < experts; ++e) {
    require(bounds[e] <= bounds[e + 1], op, ": bounds must not decrease, got ", bounds[e], " then ",
            bounds[e + 1]);
  }
}

}  // namespace beit3_fast::operands
