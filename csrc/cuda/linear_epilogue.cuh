// What comes behind the products of expert_linear, in the registers in which the tensor cores leave
// them.
//
// Thread 4 g + t of a warp holds rows g and g + 8 of 16 and, of every block of 8 columns, the
// columns 2 t and 2 t + 1. Memory is read and written in 16 bytes, a block of a row, so four
// neighbours trade words: each has one of four blocks whole, instead of a quarter of each.
#pragma once

#include "linear_tiles.h"
#include "portable.cuh"

namespace beit3_fast::cuda {

__device__ __forceinline__ float sum_of_quad(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// Word j of thread t of four neighbours changes places with word t of thread j.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&words)[4]) {
  const int t = lane_index() % 4;
#pragma unroll
  for (int distance = 2; distance > 0; distance /= 2) {
    const bool upper = (t & distance) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = distance == 2 ? i : 2 * i;
      const int high = low + distance;
      const uint32_t received = shuffle_xor(upper ? words[low] : words[high], distance);
      words[low] = upper ? received : words[low];
      words[high] = upper ? words[high] : received;
    }
  }
}

__device__ __forceinline__ float gelu(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
}

// A row of the tile, and what LayerNorm makes of its sums.
struct LinearRow {
  int row;
  bool real;
  float mean;
  float rstd;
};

// Chan's combination of the moments of parts, by four neighbours.
__device__ inline void read_moments(const ExpertLinear& op, LinearRow& own) {
  const float* parts = op.parts + int64_t{own.row} * op.num_parts * 2;
  const auto features = static_cast<float>(op.in_features);
  const auto count = [&](int part) {
    return static_cast<float>(min(op.in_features - part * op.part_width, op.part_width));
  };
  float mean = 0.0f, squares = 0.0f;
  for (int part = lane_index() % 4; part < op.num_parts; part += 4) {
    mean += parts[2 * part] * (count(part) / features);
  }
  own.mean = sum_of_quad(mean);
  for (int part = lane_index() % 4; part < op.num_parts; part += 4) {
    const float shift = parts[2 * part] - own.mean;
    squares += parts[2 * part + 1] + shift * shift * count(part);
  }
  own.rstd = 1.0f / sqrtf(sum_of_quad(squares) / features + op.eps);
}

// The row at a place; places past the end repeat the last one, and nothing of them is stored.
__device__ inline LinearRow row_at(const ExpertLinear& op, int place, int end) {
  const int inside = min(place, end - 1);
  LinearRow own{op.rows == nullptr ? inside : static_cast<int>(op.rows[inside]), place < end, 0.0f,
                1.0f};
  if (op.parts != nullptr) read_moments(op, own);
  return own;
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

template <class T>
__device__ __forceinline__ void store_numbers(void* to, int64_t stride, const LinearRow& own,
                                              const LinearBlock& block,
                                              const uint32_t (&words)[4]) {
  uint32_t whole[4] = {words[0], words[1], words[2], words[3]};
  transpose_in_quad(whole);
  if (block.real)
    store_16_bytes(static_cast<uint16_t*>(to) + own.row * stride + block.column, whole);
}

template <class T>
__device__ __forceinline__ void add_residual(const ExpertLinear& op, const LinearRow& own,
                                             const LinearBlock& block,
                                             float (&values)[kQuadNumbers]) {
  uint32_t words[4] = {};
  const auto* from = static_cast<const uint16_t*>(op.residual);
  if (block.real) load_16_bytes(words, from + own.row * op.residual_stride + block.column);
  transpose_in_quad(words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] += low_of<T>(words[i]);
    values[2 * i + 1] += high_of<T>(words[i]);
  }
}

// 32 columns of a row, from the sums of the products to the stored result, whose words are left
// behind.
template <class T>
__device__ __forceinline__ void finish_row(const ExpertLinear& op, const LinearRow& own, int first,
                                           const LinearVectors& vectors,
                                           float (&values)[kQuadNumbers], uint32_t (&words)[4]) {
  const LinearBlock block(op, first, own.real);
#pragma unroll
  for (int i = 0; i < kQuadNumbers; ++i) {
    values[i] = (values[i] - own.mean * vectors.sum[i]) * own.rstd + vectors.bias[i];
  }
  if (op.z != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
    store_numbers<T>(op.z, op.y_stride, own, block, words);
  }
  if (op.gelu) {
#pragma unroll
    for (int i = 0; i < kQuadNumbers; ++i) values[i] = gelu(values[i]);
  }
  if (op.residual != nullptr) add_residual<T>(op, own, block, values);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
  store_numbers<T>(op.y, op.y_stride, own, block, words);
}

// Moments of the numbers that were stored: those that the next op reads.
template <class T>
__device__ __forceinline__ void store_moments(
    const ExpertLinear& op, const LinearRow& own, int first,
    const uint32_t (&words)[kTileColumns / kQuadColumns][4]) {
  const int count = min(static_cast<int>(op.out_features) - first, kTileColumns);
  const auto sum_over_columns = [&](auto term) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kTileColumns / 8; ++i) {
      const uint32_t word = words[i / 4][i % 4];
      if (8 * i < count) sum += term(low_of<T>(word)) + term(high_of<T>(word));
    }
    return sum_of_quad(sum);
  };
  const float mean = sum_over_columns([](float y) { return y; }) / static_cast<float>(count);
  const float squares = sum_over_columns([mean](float y) { return (y - mean) * (y - mean); });
  if (!own.real || lane_index() % 4 != 0) return;
  const int64_t part =
      int64_t{own.row} * tiles_of(op.out_features, kTileColumns) + first / kTileColumns;
  op.y_parts[2 * part] = mean;
  op.y_parts[2 * part + 1] = squares;
}

// Two rows of the tile in all its columns, from the sums of a product of 64 rows.
template <class T>
__device__ __forceinline__ void finish_rows(const ExpertLinear& op, const LinearTile& tile,
                                            const LinearRow (&rows)[2],
                                            const float (&sums)[kTileColumns / 2]) {
  constexpr int kTurns = kTileColumns / kQuadColumns;
  uint32_t words[2][kTurns][4];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int first = opaque(tile.column + turn * kQuadColumns);
    const LinearVectors vectors(op, tile.expert, first);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float values[kQuadNumbers];
#pragma unroll
      for (int j = 0; j < kQuadNumbers; ++j)
        values[j] = sums[turn * 16 + j / 2 * 4 + 2 * i + j % 2];
      finish_row<T>(op, rows[i], first, vectors, values, words[i][turn]);
    }
  }
  if (op.y_parts == nullptr) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) store_moments<T>(op, rows[i], tile.column, words[i]);
}

}  // namespace beit3_fast::cuda
