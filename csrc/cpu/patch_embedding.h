// Images [B, K, H, W] -> rows: the class token and one product for each patch, positions added, and
// if wanted the same without them.
#pragma once

#include "elements.h"
#include "parallel.h"

namespace beit3_fast::cpu {

struct PatchEmbedding {
  DType dtype = DType::kFloat32;
  const void* images = nullptr;  // contiguous
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  int64_t patch = 0;
  const void* packed = nullptr;  // from pack_weight: [C, K * patch * patch]
  int64_t out_features = 0;
  Parameter bias;                   // [C]
  Parameter cls_token;              // [C]
  Parameter mask_token;             // [C]
  const void* positions = nullptr;  // [1 + patches, C] of the op's dtype, or null
  const unsigned char* masked =
      nullptr;            // [B, patches], not zero where the mask token stands; or null
  void* out = nullptr;    // [B, 1 + patches, C]
  void* words = nullptr;  // the same without positions, or null
};

// Arguments are trusted: the binding layer has checked shapes and ranges.
void patch_embedding(const Pool& pool, const PatchEmbedding& op);

}  // namespace beit3_fast::cpu
