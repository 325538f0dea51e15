// What the bindings of the CUDA kernels do with their arguments.
//
// Compiled for the tests with BEIT3_FAST_EMULATE_CUDA, the name of a namespace of ops, they take
// tensors on the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <vector>

#include "operands.h"

struct CUstream_st;  // what cudaStream_t points to

namespace beit3_fast::operands {

#ifdef BEIT3_FAST_EMULATE_CUDA
#define BEIT3_FAST_DEVICE CPU
#define BEIT3_FAST_NAMESPACE BEIT3_FAST_EMULATE_CUDA
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
#else
#define BEIT3_FAST_DEVICE CUDA
#define BEIT3_FAST_NAMESPACE beit3_fast
struct __attribute__((visibility("hidden"))) DeviceGuard {
  explicit DeviceGuard(const Tensor& t) : own(t.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard own;
};
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
#endif

inline CUstream_st* stream_of(int64_t handle) { return reinterpret_cast<CUstream_st*>(handle); }

inline void require_half(const Tensor& t, const Tensor& first, const char* op, const char* name) {
  require(on_device(t) && t.get_device_index() == first.get_device_index(), op, ": ", name,
          " must be on the device of the first argument, a GPU");
  require(t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half, op, ": ",
          name, " must be bfloat16 or float16");
  require(t.scalar_type() == first.scalar_type(), op, ": ", name,
          " must have the dtype of the first argument");
}

// Rows of 16 bits, whose elements lie side by side.
inline void require_rows(const Tensor& t, const Tensor& first, const char* op, const char* name) {
  require_half(t, first, op, name);
  require_matrix(t, op, name);
}

// A contiguous tensor of this type on the device of `first`.
template <class Number>
Number* numbers_of(const Tensor& t, const Tensor& first, ScalarType type, int64_t count,
                   const char* op, const char* name) {
  require(on_device(t) && t.get_device_index() == first.get_device_index() &&
              t.scalar_type() == type && t.is_contiguous() && t.numel() == count,
          op, ": ", name, " must be contiguous, of ", count,
          " numbers of its type, on the device of the first argument; got shape ", shape_of(t));
  return static_cast<Number*>(t.mutable_data_ptr());
}

template <class Op>
typename Op::Element element_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Half ? Op::Element::kFloat16 : Op::Element::kBFloat16;
}

// Bounds of the experts; whether the rows reach so far is the caller's to ask.
template <class Op>
void take_bounds(Op& call, const std::vector<int64_t>& bounds, const char* op) {
  for (std::size_t e = 0; e < bounds.size(); ++e) {
    call.bounds[e] = bounds[e];
    require(bounds[e] >= (e > 0 ? bounds[e - 1] : 0), op,
            ": bounds must be ascending and not negative");
  }
}

// Statistics of the rows x, in parts of `part_width` of their `in` columns, for a folded LayerNorm.
template <class Op>
void take_moments(Op& call, const Tensor& x, int64_t count, int64_t in, bool with_sums,
                  const std::optional<Tensor>& parts, int64_t part_width, const char* op) {
  require(with_sums == parts.has_value(), op, ": sums and parts come together");
  if (!parts.has_value()) return;
  require(part_width > 0, op, ": part_width must be positive, got ", part_width);
  call.num_parts = (in + part_width - 1) / part_width;
  call.part_width = part_width;
  call.parts =
      numbers_of<float>(*parts, x, ScalarType::Float, count * call.num_parts * 2, op, "parts");
}

inline void raise(const char* op, const char* error) { require(error == nullptr, op, ": ", error); }

}  // namespace beit3_fast::operands
