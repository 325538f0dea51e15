// The softmax of a warp group's 64 queries, in the registers in which the tensor cores leave scores
// and take weights.
//
// Thread 4 g + t of a warp holds the rows g and g + 8 of the warp's 16 and, of every block of 8
// columns, the columns 2 t and 2 t + 1: numbers 4 b and 4 b + 1 of an array are block b of the
// first row, 4 b + 2 and 4 b + 3 of the second.
#pragma once

#include "attention_rows.cuh"
#include "quad.cuh"

namespace beit3_fast::cuda {

// A thread's two queries among the 64 that begin at `first`. Those past the end repeat the last
// one.
struct QueryPair {
  int query[2];
  bool real[2];
  int limit[2];
  bool any;         // whether the warp has a query
  int seen_by_all;  // keys that every query of the 64 sees

  __device__ QueryPair(const SharedAttention& op, const Head& head, int first) {
    const int last = head.queries.count() - 1;
    const int own = first + 16 * (warp_index() % 4) + lane_index() / 4;
    for (int row = 0; row < 2; ++row) {
      real[row] = own + 8 * row <= last;
      query[row] = min(own + 8 * row, last);
      limit[row] = head.limit(op, query[row]);
    }
    any = first + 16 * (warp_index() % 4) <= last;
    seen_by_all = head.limit(op, min(first, last));
  }
};

// A softmax over keys that come in blocks, or all at once.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY};  // highest score
  float total[2] = {0.0f, 0.0f};          // sum of the weights in this thread's columns

  // Scores of the keys from `first` on become weights, exp2(scale (score - top)). `decay` is what
  // earlier weights are to be multiplied by.
  template <int kKeys>
  __device__ void weigh(float (&scores)[kKeys / 2], const QueryPair& pair, int first, float scale,
                        float (&decay)[2]) {
    decay[0] = decay[1] = 1.0f;
    // Queries past the end are rows of zeros, whose scores are zeros: as good weights as any.
    if (!pair.any) return;
    if (first + kKeys > pair.seen_by_all) hide<kKeys>(scores, pair, first);
    weigh_visible(scores, scale, decay);
  }

  // As weigh, of scores that are -inf where a key is not seen.
  template <int kSize>
  __device__ void weigh_visible(float (&scores)[kSize], float scale, float (&decay)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float even = scores[2 * row];
      float odd = scores[2 * row + 1];
#pragma unroll
      for (int i = 4 + 2 * row; i < kSize; i += 4) {
        even = fmaxf(even, scores[i]);
        odd = fmaxf(odd, scores[i + 1]);
      }
      const float highest = quad_max(fmaxf(top[row], fmaxf(even, odd)));
      // A query that has seen no key yet: any finite number instead of inf - inf.
      const float pivot = highest == -INFINITY ? 0.0f : highest * scale;
      decay[row] = exp2_fast(top[row] * scale - pivot);
      top[row] = highest;
      even = odd = 0.0f;
#pragma unroll
      for (int i = 2 * row; i < kSize; i += 4) {
        scores[i] = exp2_fast(fmaf(scores[i], scale, -pivot));
        scores[i + 1] = exp2_fast(fmaf(scores[i + 1], scale, -pivot));
        even += scores[i];
        odd += scores[i + 1];
      }
      total[row] = total[row] * decay[row] + (even + odd);
    }
  }

 private:
  // Scores of keys that a query does not see become -inf; `first` is the key of column 0.
  template <int kKeys>
  __device__ void hide(float (&scores)[kKeys / 2], const QueryPair& pair, int first) {
    const int column = first + 2 * (lane_index() % 4);
#pragma unroll
    for (int block = 0; block < kKeys / 8; ++block) {
      if (first + 8 * block + 8 <= pair.seen_by_all) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + 8 * block + i % 2 >= pair.limit[i / 2]) scores[4 * block + i] = -INFINITY;
      }
    }
  }
};

// Weights in 16 bits, as the left operand of products of 16 keys each; keys past kKeys weigh
// nothing.
template <class T, int kKeys>
struct Weights {
  static constexpr int kSteps = (kKeys + 15) / 16;
  uint32_t words[kSteps][4];

  __device__ void take(const float (&weights)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) {
      words[i / 4][i % 4] = 2 * i < kKeys / 2 ? pack2<T>(weights[2 * i], weights[2 * i + 1]) : 0;
    }
  }
};

// What one query's row of the result leaves behind. `words`: its numbers in 16 bits, two a word,
// one word a block. `store` is given eight columns in four words and where they begin.
template <int kHeadDim, class Store>
__device__ void store_row(bool real, const uint32_t (&words)[(kHeadDim + 31) / 32 * 4],
                          Store store) {
#pragma unroll
  for (int first = 0; first < kHeadDim / 8; first += 4) {
    uint32_t own[4] = {words[first], words[first + 1], words[first + 2], words[first + 3]};
    transpose_in_quad(own);
    const int block = first + lane_index() % 4;
    if (real && block < kHeadDim / 8) store(8 * block, own);
  }
}

struct NoRounding {
  __device__ NoRounding(const SharedAttention&, const Head&) {}
  __device__ void store(int64_t, int, const uint32_t (&)[4]) const {}
  __device__ void store_scale(int64_t) const {}
};

template <class T, int kHeadDim>
__device__ void store_moments(const SharedAttention& op, int64_t row, int head, bool real,
                              const uint32_t (&words)[(kHeadDim + 31) / 32 * 4]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) sum += low_of<T>(words[i]) + high_of<T>(words[i]);
  const float mean = quad_sum(sum) / kHeadDim;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; ++i) {
    const float low = low_of<T>(words[i]) - mean;
    const float high = high_of<T>(words[i]) - mean;
    squares += low * low + high * high;
  }
  squares = quad_sum(squares);
  if (!real || lane_index() % 4 != 0) return;
  float* at = op.parts + (row * op.num_heads + head) * 2;
  at[0] = mean;
  at[1] = squares;
}

// The result of 64 queries, from the sums of weighted values; `Rounding` is NoRounding, or puts it
// into 8 bits as well.
template <class T, int kHeadDim, class Rounding, int kSize>
__device__ void store_result(const AttentionCall& call, const Head& head, const QueryPair& pair,
                             const Softmax& softmax, const float (&sums)[kSize]) {
  constexpr int kWords = (kHeadDim + 31) / 32 * 4;
  const SharedAttention& op = call.op;
  const Rounding rounding(op, head);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = quad_sum(softmax.total[i]);
    // A query that sees no key gives zeros. A NaN stays one.
    const float factor = 1.0f / (total == 0.0f ? 1.0f : total);
    uint32_t words[kWords];
#pragma unroll
    for (int block = 0; block < kWords; ++block) {
      const float* two = sums + 4 * block + 2 * i;
      words[block] = 8 * block < kHeadDim ? pack2<T>(two[0] * factor, two[1] * factor) : 0;
    }
    const int64_t row = head.queries.row(pair.query[i]);
    const int64_t first = row * op.o_stride + head.index * kHeadDim;
    store_row<kHeadDim>(pair.real[i], words, [&](int column, const uint32_t(&own)[4]) {
      if (op.o != nullptr) store_16_bytes(static_cast<uint16_t*>(op.o) + first + column, own);
      rounding.store(row, column, own);
    });
    if (pair.real[i] && lane_index() % 4 == 0) rounding.store_scale(row);
    if (op.parts != nullptr) store_moments<T, kHeadDim>(op, row, head.index, pair.real[i], words);
    if (op.lse != nullptr && pair.real[i] && lane_index() % 4 == 0) {
      op.lse[row * op.num_heads + head.index] = softmax.top[i] * call.scale + log2f(total);
    }
  }
}

}  // namespace beit3_fast::cuda
