// The likeliest classes of rows of logits, and the logarithms of their probabilities.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace beit3_fast::cpu {

struct Likeliest {
  DType dtype = DType::kFloat32;
  const void* logits = nullptr;  // [rows, classes], rows `stride` elements apart
  int64_t stride = 0;
  int64_t rows = 0;
  int64_t classes = 0;
  // [classes], not zero where the class may be chosen; null: all. All count in the softmax.
  const unsigned char* allowed = nullptr;
  int64_t wanted = 0;  // at most classes
  // [rows, wanted], best first, of equals the lower class. Where fewer are allowed, others follow
  // with -inf.
  float* log_p = nullptr;
  int64_t* chosen = nullptr;
};

// Arguments are trusted: the binding layer has checked shapes and ranges.
void likeliest(const Pool& pool, const Likeliest& op);

}  // namespace beit3_fast::cpu
