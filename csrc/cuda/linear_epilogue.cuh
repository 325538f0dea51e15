// What comes behind the products of expert_linear, in the registers in which the tensor cores leave
// them.
//
// Thread 4 g + t of a warp holds rows g and g + 8 of 16 and, of every block of 8 columns, the
// columns 2 t and 2 t + 1. Memory is read and written in 16 bytes, a block of a row, so four
// neighbours trade words: each has one of four blocks whole, instead of a quarter of each.
#pragma once

#include "linear_tiles.h"
#include "quad.cuh"

namespace beit3_fast::cuda {

// GELU by the tail of the normal distribution: Q(|x|) = exp(-x^2 / 2) P(1 / (1 + s |x|)), the
// polynomial fitted to a relative error of 5e-6. erff takes ten instructions more, and all of a
// tile's must fit beside the other group's products.
__device__ __forceinline__ float gelu(float x) {
  constexpr float kScale = 3.075914383e-01f, kHalfLog2E = 7.213475204e-01f;
  const float t = reciprocal_fast(fmaf(fabsf(x), kScale, 1.0f));
  float tail = fmaf(t, -7.543028146e-02f, 1.906501055e-01f);
  tail = fmaf(tail, t, 6.426759064e-03f);
  tail = fmaf(tail, t, 1.367231160e-01f);
  tail = fmaf(tail, t, 1.186670884e-01f);
  tail = fmaf(tail, t, 1.229627803e-01f);
  tail *= t * exp2_fast(x * -kHalfLog2E * x);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// A row of the tile, and what LayerNorm makes of its sums. Places past the end repeat the last one,
// and nothing of them is stored.
struct LinearRow {
  int place;
  bool real;
  float mean;
  float rstd;

  // Named rows are looked up whenever they are needed: there is no register left to keep them in.
  __device__ int64_t row(const ExpertLinear& op) const {
    return op.rows == nullptr ? place : op.rows[place];
  }
};

// Chan's combination of the moments of parts, by four neighbours.
__device__ inline void read_moments(const ExpertLinear& op, LinearRow& own) {
  const int features = static_cast<int>(op.in_features), width = static_cast<int>(op.part_width);
  const float each = reciprocal_fast(static_cast<float>(features));
  const auto count = [&](int part) {
    return static_cast<float>(min(features - part * width, width));
  };
  const float* parts = op.parts + own.row(op) * op.num_parts * 2;
  float mean = 0.0f, squares = 0.0f, part_mean, part_squares;
#pragma unroll 1
  for (int part = lane_index() % 4; part < op.num_parts; part += 4) {
    load_two(part_mean, part_squares, parts + 2 * part);
    mean += part_mean * count(part);
  }
  own.mean = quad_sum(mean) * each;
#pragma unroll 1
  for (int part = lane_index() % 4; part < op.num_parts; part += 4) {
    load_two(part_mean, part_squares, parts + 2 * part);
    const float shift = part_mean - own.mean;
    squares += part_squares + shift * shift * count(part);
  }
  own.rstd = reciprocal_root_fast(quad_sum(squares) * each + op.eps);
}

__device__ inline LinearRow row_of_tile(const ExpertLinear& op, int place, int end) {
  LinearRow own{min(place, end - 1), place < end, 0.0f, 1.0f};
  if (op.parts != nullptr) read_moments(op, own);
  return own;
}

// The two rows of each band of which this thread has sums: warp w of four has 16 rows from 16 w on.
template <int kBands>
__device__ __forceinline__ void take_rows_of_tile(const ExpertLinear& op, const LinearTile& tile,
                                                  int warp, LinearRow (&rows)[2 * kBands]) {
#pragma unroll
  for (int r = 0; r < 2 * kBands; ++r) {
    const int inside = r / 2 * kBandRows + warp * 16 + r % 2 * 8 + lane_index() / 4;
    rows[r] = row_of_tile(op, tile.first + inside, tile.end);
  }
}

constexpr int kQuadColumns = 32;  // that four neighbours trade at once
constexpr int kQuadNumbers = 8;   // of a thread among them

// Bias and sum of weights at a thread's columns among 32.
struct LinearVectors {
  float bias[kQuadNumbers];
  float sum[kQuadNumbers];

  __device__ LinearVectors(const ExpertLinear& op, int expert, int first) {
    const int64_t at = int64_t{expert} * op.out_features + first + lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kQuadNumbers; i += 2) {
      const bool real = first + 4 * i < op.out_features;
      bias[i] = bias[i + 1] = sum[i] = sum[i + 1] = 0.0f;
      if (real && op.biases != nullptr) load_two(bias[i], bias[i + 1], op.biases + at + 4 * i);
      if (real && op.parts != nullptr) load_two(sum[i], sum[i + 1], op.sums + at + 4 * i);
    }
  }
};

// The block of 8 columns that this thread reads and writes, where it is one of the tensor's.
struct LinearBlock {
  int column;
  bool real;

  __device__ LinearBlock(const ExpertLinear& op, int first, bool real_row)
      : column(first + lane_index() % 4 * 8), real(real_row && column < op.out_features) {}
};

__device__ __forceinline__ void store_numbers(void* to, int64_t stride, int64_t row,
                                              const LinearBlock& block,
                                              const uint32_t (&words)[4]) {
  uint32_t whole[4] = {words[0], words[1], words[2], words[3]};
  transpose_in_quad(whole);
  if (block.real) store_16_bytes(static_cast<uint16_t*>(to) + row * stride + block.column, whole);
}

template <class T>
__device__ __forceinline__ void add_residual(const ExpertLinear& op, int64_t row,
                                             const LinearBlock& block,
                                             float (&values)[kQuadNumbers]) {
  uint32_t words[4] = {};
  const auto* from = static_cast<const uint16_t*>(op.residual);
  if (block.real) load_16_bytes(words, from + row * op.residual_stride + block.column);
  transpose_in_quad(words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] += low_of<T>(words[i]);
    values[2 * i + 1] += high_of<T>(words[i]);
  }
}

// Moments of a thread's numbers of a row, added up by Chan's combination. Neighbours have equally
// many.
struct LinearMoments {
  float mean = 0.0f;
  float squares = 0.0f;

  // Two numbers of each of up to four blocks of columns, zeros in those that are not there;
  // `before`: how many blocks have been added.
  template <class T>
  __device__ void add(const uint32_t (&words)[4], int before, int blocks) {
    if (blocks <= 0) return;
    const float count = static_cast<float>(2 * min(blocks, 4)),
                earlier = static_cast<float>(2 * before);
    float sum = 0.0f, own = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum += low_of<T>(words[i]) + high_of<T>(words[i]);
    }
    const float own_mean = sum * reciprocal_fast(count);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = low_of<T>(words[i]) - own_mean, high = high_of<T>(words[i]) - own_mean;
      if (i < blocks) own += low * low + high * high;
    }
    const float shift = own_mean - mean, share = count * reciprocal_fast(earlier + count);
    mean += shift * share;
    squares += own + shift * shift * earlier * share;
  }

  // With the numbers of all four neighbours, `count` of each.
  __device__ void join(float count) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const float shift = shuffle_xor(mean, distance) - mean;
      squares += shuffle_xor(squares, distance) + shift * shift * (0.5f * count);
      mean += 0.5f * shift;
      count *= 2.0f;
    }
  }
};

// 32 columns of a row, from the sums of the products to the stored result, whose words are left
// behind. kBare: the result may be wanted in another form alone.
template <class T, bool kBare>
__device__ __forceinline__ void finish_row(const ExpertLinear& op, const LinearRow& own, int first,
                                           const LinearVectors& vectors,
                                           float (&values)[kQuadNumbers], uint32_t (&words)[4]) {
  const LinearBlock block(op, first, own.real);
  const int64_t row = own.row(op);
#pragma unroll
  for (int i = 0; i < kQuadNumbers; ++i) {
    values[i] = (values[i] - own.mean * vectors.sum[i]) * own.rstd + vectors.bias[i];
  }
  if (op.z != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
    store_numbers(op.z, op.y_stride, row, block, words);
  }
  if (op.gelu) {
#pragma unroll
    for (int i = 0; i < kQuadNumbers; ++i) values[i] = gelu(values[i]);
  }
  if (op.residual != nullptr) add_residual<T>(op, row, block, values);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
  if (!kBare || op.y != nullptr) store_numbers(op.y, op.y_stride, row, block, words);
}

// Where the moments of a row's columns of the tile belong.
__device__ __forceinline__ float* part_of(const ExpertLinear& op, const LinearTile& tile,
                                          int64_t row) {
  return op.y_parts + (row * column_tiles(op) + tile.column / kTileColumns) * 2;
}

__device__ inline void store_moments(const ExpertLinear& op, const LinearTile& tile,
                                     const LinearRow& own, LinearMoments& moments) {
  const int columns = min(static_cast<int>(op.out_features) - tile.column, kTileColumns);
  moments.join(static_cast<float>(columns / 4));
  if (!own.real || lane_index() % 4 != 0) return;
  float* part = part_of(op, tile, own.row(op));
  part[0] = moments.mean;
  part[1] = moments.squares;
}

// The thread's rows of the tile in kColumns columns, from the sums of a product for each band.
// The moments are those of the numbers that were stored: the next op reads these. kKeeps: they take
// the place of the sums.
template <class T, int kBands, bool kKeeps, int kColumns>
__device__ __forceinline__ void finish_columns(const ExpertLinear& op, const LinearTile& tile,
                                               const LinearRow (&rows)[2 * kBands],
                                               float (&sums)[kBands][kColumns / 2],
                                               LinearMoments (&moments)[2 * kBands]) {
#pragma unroll
  for (int turn = 0; turn < kColumns / kQuadColumns; ++turn) {
    const int first = tile.column + turn * kQuadColumns;
    const int blocks = (static_cast<int>(op.out_features) - first) / 8;
    const LinearVectors vectors(op, tile.expert, first);
#pragma unroll
    for (int r = 0; r < 2 * kBands; ++r) {
      float values[kQuadNumbers];
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < kQuadNumbers; ++j) {
        values[j] = sums[r / 2][turn * 16 + j / 2 * 4 + r % 2 * 2 + j % 2];
      }
      finish_row<T, kKeeps>(op, rows[r], first, vectors, values, words);
      if constexpr (kKeeps) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[r / 2][turn * 16 + i * 4 + r % 2 * 2] = low_of<T>(words[i]);
          sums[r / 2][turn * 16 + i * 4 + r % 2 * 2 + 1] = high_of<T>(words[i]);
        }
      }
      if (op.y_parts != nullptr) moments[r].template add<T>(words, 4 * turn, blocks);
    }
  }
}

// All columns of the tile, with the moments stored.
template <class T, int kBands, bool kKeeps = false>
__device__ __forceinline__ void finish_tile(const ExpertLinear& op, const LinearTile& tile,
                                            const LinearRow (&rows)[2 * kBands],
                                            float (&sums)[kBands][kTileColumns / 2]) {
  LinearMoments moments[2 * kBands];
  finish_columns<T, kBands, kKeeps, kTileColumns>(op, tile, rows, sums, moments);
  if (op.y_parts == nullptr) return;
#pragma unroll
  for (int r = 0; r < 2 * kBands; ++r) store_moments(op, tile, rows[r], moments[r]);
}

}  // namespace beit3_fast::cuda
