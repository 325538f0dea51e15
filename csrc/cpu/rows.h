// What happens to rows between and behind the products.
#pragma once

#include <vector>

#include "elements.h"
#include "parallel.h"

namespace beit3_fast::cpu {

struct NormExpert {
  Parameter weight;  // [C]
  Parameter bias;    // [C]
  float eps = 0.0f;
  // Its rows.
  int64_t begin = 0;
  int64_t end = 0;
};

// Rows [R, C], each normalised by its expert.
struct LayerNorm {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;
  int64_t x_stride = 0;  // elements
  int64_t width = 0;
  std::vector<NormExpert> experts;
  void* out = nullptr;  // dense
};

// Gradients of rows [R, C], of their LayerNorm's weight and of its bias, given those of its
// results.
struct LayerNormGradients {
  DType dtype = DType::kFloat32;  // of rows and gradients
  const void* x = nullptr;
  int64_t x_stride = 0;  // elements
  const void* grad = nullptr;
  int64_t grad_stride = 0;
  int64_t rows = 0;
  int64_t width = 0;
  Parameter weight;  // [C]
  float eps = 0.0f;
  void* x_grad = nullptr;  // dense
  // Of the dtype of `weight`.
  void* weight_grad = nullptr;
  void* bias_grad = nullptr;
};

// x [R, C] as rows of its columns, [C, R].
struct Transposition {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;
  int64_t x_stride = 0;  // elements
  int64_t rows = 0;
  int64_t columns = 0;
  void* out = nullptr;  // dense
};

// Row r of x becomes row places[r] of the result; the others are zero.
struct UnpackRows {
  const void* x = nullptr;  // rows of `bytes`, `x_stride` bytes apart
  int64_t x_stride = 0;
  int64_t bytes = 0;
  int64_t rows = 0;
  const int64_t* places = nullptr;
  int64_t count = 0;    // rows of the result
  void* out = nullptr;  // dense
};

// Arguments are trusted: the binding layer has checked shapes and ranges.
void layer_norm(const Pool& pool, const LayerNorm& op);
void layer_norm_gradients(const Pool& pool, const LayerNormGradients& op);
void transpose(const Pool& pool, const Transposition& op);
void unpack_rows(const Pool& pool, const UnpackRows& op);

}  // namespace beit3_fast::cpu
