// Where the rows of a sample lie, which keys a query sees, and what a tile of rows looks like in
// shared memory.
//
// A sample's rows are one sequence of places: its vision rows, then its text rows. A tile of places
// is kParts blocks of 128-byte rows (64 columns each, 128-byte swizzle): one for a head of 64, two
// for one of 88, padded with zeros.
#pragma once

#include <cstdint>

#include "portable.cuh"
#include "shared_attention.h"

namespace beit3_fast::cuda {

constexpr int kRowBytes = 128;
constexpr int kPartColumns = 64;
constexpr int kQueries = 64;  // of a tile

// What all thread blocks of a launch are told.
struct AttentionCall {
  SharedAttention op;
  float scale;     // of op, times log2(e)
  int tiles;       // query tiles of the longest sample
  int tile_steps;  // thread blocks among which the tiles of one head are dealt out
};

struct Places {
  int vision;
  int num_vision;
  int text;
  int num_text;

  __device__ int count() const { return num_vision + num_text; }

  __device__ int row(int place) const {
    return place < num_vision ? vision + place : text + place - num_vision;
  }

  // Whether the rows of `size` places lie side by side.
  __device__ bool together(int place, int size) const {
    return place + size <= num_vision || (place >= num_vision && place + size <= count());
  }
};

__device__ inline Places places_of(const int32_t* cu_vision, const int32_t* cu_text, int sample,
                                   int batch) {
  const int vision = cu_vision[sample];
  const int text = cu_text[sample];
  return {vision, cu_vision[sample + 1] - vision, cu_vision[batch] + text,
          cu_text[sample + 1] - text};
}

// One head of one sample.
struct Head {
  Places keys;
  Places queries;
  int index;

  // How many keys, in the order of places, a query sees. Never less for a later query.
  __device__ int limit(const SharedAttention& op, int query) const {
    int place = query;
    if (op.positions_q != nullptr) {
      place =
          op.positions_q[queries.row(query)] + (query < queries.num_vision ? 0 : keys.num_vision);
    }
    if (op.mask == SharedAttention::Mask::kCausal) return place + 1;
    if (op.mask == SharedAttention::Mask::kSeq2Seq) return max(place + 1, keys.num_vision);
    return keys.count();
  }
};

__device__ inline Head head_of(const SharedAttention& op, int sample, int head) {
  const int batch = static_cast<int>(op.batch);
  return {places_of(op.cu_vision, op.cu_text, sample, batch),
          places_of(op.cu_vision_q, op.cu_text_q, sample, batch), head};
}

template <int kHeadDim>
struct HeadShape {
  static_assert(kHeadDim == 64 || kHeadDim == 88, "heads of 64 or 88 columns");
  static constexpr int kParts = kHeadDim > kPartColumns ? 2 : 1;
  static constexpr int kColumns = (kHeadDim + 31) / 32 * 32;  // 96 for 88
  static constexpr int kRowBytes = kParts * cuda::kRowBytes;  // of one row, in all parts
};

}  // namespace beit3_fast::cuda
