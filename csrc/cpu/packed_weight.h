// A weight [O, I] in the layout of kernels.h, behind a header that says what it is.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace beit3_fast::cpu {

constexpr int64_t kHeaderBytes = 64;

// Whole size of the packed weight in bytes, header included: a multiple of 64.
int64_t packed_bytes(DType dtype, int64_t out_features, int64_t in_features);
int64_t panel_words(DType dtype, int64_t in_features);
inline int64_t panel_count(int64_t out_features) { return (out_features + kPanel - 1) / kPanel; }

// `packed` needs packed_bytes(...) bytes. `stride` counts elements between rows of `weight`.
void pack_weight(const Pool& pool, DType dtype, const void* weight, int64_t stride,
                 int64_t out_features, int64_t in_features, void* packed);
// The weight [out_features, in_features] whose transpose lies in memory: x [in_features,
// out_features], rows `stride` elements apart.
void pack_transposed(const Pool& pool, DType dtype, const void* x, int64_t stride,
                     int64_t out_features, int64_t in_features, void* packed);
// pack_weight's bytes by the portable kernels, at any level of instructions.
void pack_weight_portably(const Pool& pool, DType dtype, const void* weight, int64_t stride,
                          int64_t out_features, int64_t in_features, void* packed);
// Rounds a weight of `dtype` to int8, an output channel at a time (kernels.h). A channel that holds
// a number that is not finite gets NaN as its scale.
void quantize_weight(const Pool& pool, DType dtype, const void* weight, int64_t stride,
                     int64_t out_features, int64_t in_features, void* packed);

// The weight again, [out_features, in_features] without gaps; an int8 weight in fp32.
void unpack_weight(const Pool& pool, DType dtype, const void* packed, int64_t out_features,
                   int64_t in_features, void* weight);

// Whether these bytes are such a weight, packed by this build. Reads no byte past `bytes`.
bool is_packed(const void* packed, int64_t bytes, DType dtype, int64_t out_features,
               int64_t in_features);

inline const uint32_t* panels_of(const void* packed) {
  return reinterpret_cast<const uint32_t*>(static_cast<const char*>(packed) + kHeaderBytes);
}

}  // namespace beit3_fast::cpu
