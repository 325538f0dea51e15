// What the bindings of all operators do with their arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace beit3_fast::operands {

using cpu::DType;
using cpu::Pool;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline Pool torch_pool() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t count, void (*body)(int64_t, void*), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(i, context);
            });
          }};
}

// The stable ABI's own conversion to std::string leaks one string a call.
inline std::string take(StringHandle handle) {
  std::size_t length = 0;
  const char* text = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  std::string out(text, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return out;
}

// For messages: written only where there is one.
struct ShapeOf {
  const Tensor& tensor;
};

inline ShapeOf shape_of(const Tensor& t) { return {t}; }

inline std::ostream& operator<<(std::ostream& out, const ShapeOf& shape) {
  out << '[';
  for (int64_t i = 0; i < shape.tensor.dim(); ++i)
    out << (i > 0 ? ", " : "") << shape.tensor.size(i);
  return out << ']';
}

// The name of one of several operands, for messages.
struct Entry {
  const char* list;
  std::size_t index;
};

inline std::ostream& operator<<(std::ostream& out, const Entry& entry) {
  return out << entry.list << '[' << entry.index << ']';
}

inline bool is_float_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16;
}

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  require(t.is_cpu(), op, ": ", name, " must be a CPU tensor");
  require(is_float_type(t), op, ": ", name, " must be float32 or bfloat16");
  return t.scalar_type() == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
}

inline void require_matrix(const Tensor& t, const char* op, const char* name) {
  require(t.dim() == 2, op, ": ", name, " must have 2 dimensions, got shape ", shape_of(t));
  require(t.size(1) <= 1 || t.numel() == 0 || t.stride(1) == 1, op, ": ", name,
          " must have stride 1 in its last dimension, got stride ", t.stride(1));
}

inline void require_same_type(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  require(t.is_cpu() && t.scalar_type() == x.scalar_type(), op, ": ", name,
          " must be a CPU tensor of the same dtype as the first argument");
}

inline float eps_of(double eps, const char* op) {
  require(std::isfinite(eps) && eps >= 0.0, op, ": eps must be finite and not negative, got ", eps);
  return static_cast<float>(eps);
}

}  // namespace beit3_fast::operands
