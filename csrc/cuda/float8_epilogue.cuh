// What comes behind 8-bit products beyond linear_epilogue.cuh: scales of the weights in front of
// it, and the result in 8 bits with its own scales behind it.
#pragma once

#include "float8_linear.h"
#include "float8_scale.cuh"
#include "linear_epilogue.cuh"

namespace beit3_fast::cuda {

template <int kBands>
__device__ __forceinline__ void scale_columns(const Float8Linear& op, const LinearTile& tile,
                                              float (&sums)[kBands][kTileColumns / 2]) {
  const float* scales = op.weight_scales + int64_t{tile.expert} * op.out_features;
#pragma unroll
  for (int block = 0; block < kTileColumns / 8; ++block) {
    const int column = tile.column + 8 * block + lane_index() % 4 * 2;
    float two[2] = {0.0f, 0.0f};
    if (column < op.out_features) load_two(two[0], two[1], scales + column);
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[band][4 * block + i] *= two[i % 2];
    }
  }
}

// A row of the tile, of which the thread holds `numbers[4 b + place]` and the next one in every
// block b of 8 columns. Four neighbours trade pairs, so that each stores 16 columns.
__device__ __forceinline__ void round_row(const Float8Linear& op, const LinearTile& tile,
                                          const LinearRow& own, int place,
                                          const float (&numbers)[kTileColumns / 2]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = place; i < kTileColumns / 2; i += 4) {
    largest = fmaxf(largest, fmaxf(fabsf(numbers[i]), fabsf(numbers[i + 1])));
  }
  const Float8Scale unit(quad_max(largest));
  const int64_t row = own.row(op);
  if (own.real && lane_index() % 4 == 0) {
    op.rounded_scales[row * column_tiles(op) + tile.column / kTileColumns] = unit.scale;
  }
  if (op.rounded == nullptr) return;
  auto* rounded = static_cast<uint8_t*>(op.rounded) + row * op.out_features;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* two = numbers + half * 32 + 8 * i + place;
      words[i] = pack4_e4m3(two[0] * unit.inverse, two[1] * unit.inverse, two[4] * unit.inverse,
                            two[5] * unit.inverse);
    }
    // Words of the four neighbours for this thread's 16 columns: the lower halves are of the first
    // block of 8.
    transpose_in_quad(words);
    const uint32_t whole[4] = {
        (words[0] & 0xffffu) | words[1] << 16, (words[2] & 0xffffu) | words[3] << 16,
        words[0] >> 16 | (words[1] & 0xffff0000u), words[2] >> 16 | (words[3] & 0xffff0000u)};
    const int column = tile.column + 64 * half + lane_index() % 4 * 16;
    if (own.real && column < op.out_features) store_16_bytes(rounded + column, whole);
  }
}

// The thread's rows of the tile, from the sums that are in units of the scales of the rows.
template <int kBands>
__device__ __forceinline__ void finish_float8_tile(const Float8Linear& op, const LinearTile& tile,
                                                   int warp,
                                                   float (&sums)[kBands][kTileColumns / 2]) {
  LinearRow rows[2 * kBands];
  take_rows_of_tile<kBands>(op, tile, warp, rows);
  scale_columns<kBands>(op, tile, sums);
  finish_tile<BFloat16, kBands, true>(op, tile, rows, sums);
  if (op.rounded_scales == nullptr) return;
#pragma unroll
  for (int r = 0; r < 2 * kBands; ++r) round_row(op, tile, rows[r], r % 2 * 2, sums[r / 2]);
}

}  // namespace beit3_fast::cuda
