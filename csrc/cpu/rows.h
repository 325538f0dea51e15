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
void unpack_rows(const Pool& pool, const UnpackRows& op);

}  // namespace beit3_fast::cpu
