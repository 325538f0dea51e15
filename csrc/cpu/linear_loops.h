// The loops of expert_linear over one block, for every Arch (tile_loops.h).
#pragma once

#include "tile_loops.h"

namespace {

inline int64_t row_of(const LinearBlock& block, int64_t sorted) {
  return block.rows == nullptr ? sorted : block.rows[sorted];
}

// The norm of one of the sorted rows, which is `row` of x.
template <class Arch, class Row>
inline Norm norm_of_row(const LinearBlock& block, int64_t sorted, const Row& row) {
  if (block.x_statistics != nullptr) {
    const RowStatistics& known = block.x_statistics[row_of(block, sorted)];
    if (!(known.variance < 0.0f)) return norm_of(known, block.eps);
  }
  return norm_of(measure<Arch>(row, block.in_features), block.eps);
}

// The norms of all rows of a block, row(i).
template <class Arch, class Row>
inline void norms_of_rows(const LinearBlock& block, const Row& row, Norm* norms) {
  constexpr int64_t kTogether = 16;
  RowStatistics own[kTogether];
  for (int64_t r = 0; r < block.count; r += kTogether) {
    const int64_t rows = min_of(kTogether, block.count - r);
    bool known = block.x_statistics != nullptr;
    for (int64_t i = 0; known && i < rows; ++i) {
      own[i] = block.x_statistics[row_of(block, block.first + r + i)];
      known = !(own[i].variance < 0.0f);
    }
    if (!known) {
      measure_rows<Arch>([&](int64_t i) { return row(r + i); }, rows, block.in_features, own);
    }
    for (int64_t i = 0; i < rows; ++i) norms[r + i] = norm_of(own[i], block.eps);
  }
}

// The sums of all rows of a block that leaves statistics.
template <class Arch>
inline float* take_row_sums(const LinearBlock& block, Carver& carver) {
  return carver.take<float>(block.statistics == nullptr ? 0 : block.count * Arch::Sums::kWords);
}

// Leaves the statistics of all rows of a block, whose sums are complete.
template <class Arch>
inline void leave_statistics(const LinearBlock& block, const float* row_sums) {
  using T = typename Arch::T;
  if (block.statistics == nullptr) return;
  for (int64_t r = 0; r < block.count; ++r, row_sums += Arch::Sums::kWords) {
    const int64_t row = row_of(block, block.first + r);
    const StripRow<T> out{static_cast<const T*>(block.out) + row * block.out_stride,
                          block.out_strip};
    block.statistics[row] = measured<Arch>(row_sums, out, block.out_features);
  }
}

struct LinearScratch {
  uint32_t* a;
  float* c;
  float* row_scales;
  float* row_sums;  // for the statistics that the block leaves
};

template <class Arch>
inline LinearScratch carve_linear(const LinearBlock& block, Carver& carver) {
  LinearScratch out;
  out.a = carver.take<uint32_t>(block.count * chunks_of<Arch>(block.in_features) * Arch::kRowWords);
  out.c = carver.take<float>(max_of(block.count, 4) * kPanel * 4);
  out.row_scales = carver.take<float>(Arch::kInt8 ? block.count : 0);
  out.row_sums = take_row_sums<Arch>(block, carver);
  return out;
}

template <class Arch>
int64_t linear_scratch(const LinearBlock& block) {
  Carver carver(nullptr);
  carve_linear<Arch>(block, carver);
  return carver.used();
}

// Rows of a tile of A, from sorted row `first` on, and their scales where they are rounded to int8.
template <class Arch, class Row>
inline void pack_rows(const Row& row, int64_t first, int64_t rows, const LinearBlock& block,
                      uint32_t* a, float* scales) {
  const auto norm = [&](int64_t r) { return norm_of_row<Arch>(block, first + r, row(r)); };
  if constexpr (Arch::kInt8) {
    pack_int8_tile<Arch>(row, rows, block.in_features, block.norm_weight, block.norm_bias, norm, a,
                         scales);
  } else {
    pack_tile<Arch>(row, rows, block.in_features, block.norm_weight, block.norm_bias, norm, a);
  }
}

// What turns int32 sums into numbers: scales of the rows of a tile and of the columns from its
// first, and what an unsigned A adds to the sums of these columns.
struct Scales {
  const float* rows;
  const float* columns;
  const int32_t* offsets;
};

// Sixteen sums of a row with bias and activation. Scaled ones and the bias are rounded once:
// whether a compiler makes one instruction of a product and an addition must not depend on who
// calls.
template <class Arch>
inline Vec activated(const float* c, int64_t row, int64_t column, const Scales& scales, Vec bias,
                     bool gelu) {
  Vec y;
  if constexpr (Arch::kInt8) {
    const Vec whole = v_integers(reinterpret_cast<const int32_t*>(c + column),
                                 Arch::kUnsigned ? scales.offsets + column : nullptr);
    y = v_fma(whole, v_mul(v_load(scales.columns + column), v_set(scales.rows[row])), bias);
  } else {
    y = v_add(v_load(c + column), bias);
  }
  return gelu ? v_gelu<typename Arch::T>(y) : y;
}

// Asks for the memory that `finish` will touch, to arrive while the products run: the pieces of
// rows are too short for the hardware to foresee.
template <class Arch>
inline void foresee(const LinearBlock& block, int64_t first, int64_t rows, int64_t column,
                    int64_t columns) {
  using T = typename Arch::T;
  constexpr int64_t line = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = row_of(block, first + r);
    const T* const out = static_cast<const T*>(block.out) + row * block.out_stride +
                         place_of(column, block.out_strip);
    for (int64_t j = 0; j < columns; j += line) __builtin_prefetch(out + j, 1);
    if (block.residual == nullptr) continue;
    const T* const residual = static_cast<const T*>(block.residual) + row * block.residual_stride +
                              place_of(column, block.residual_strip);
    for (int64_t j = 0; j < columns; j += line) __builtin_prefetch(residual + j, 0);
  }
}

// Bias, activation, residual and the store of one tile of products; with Bare also of what the
// residual is added to, and with Summed the sums of what is stored, for statistics.
template <class Arch, bool Gelu, bool Residual, bool Bare, bool Summed>
inline void finish(const LinearBlock& block, int64_t first, int64_t rows, int64_t column,
                   int64_t columns, const float* c, int64_t c_stride, const Scales& scales,
                   float* row_sums) {
  using T = typename Arch::T;
  using Sums = typename Arch::Sums;
  T* const out = static_cast<T*>(block.out);
  T* const bare = static_cast<T*>(block.bare);
  const T* const residual = static_cast<const T*>(block.residual);
  const int64_t out_place = place_of(column, block.out_strip);
  const int64_t residual_place = place_of(column, block.residual_strip);
  float* words = row_sums + (first - block.first) * Sums::kWords;
  for (int64_t r = 0; r < rows; ++r, c += c_stride, words += Sums::kWords) {
    const int64_t row = row_of(block, first + r);
    T* const to = out + row * block.out_stride + out_place;
    const T* const added =
        Residual ? residual + row * block.residual_stride + residual_place : nullptr;
    Sums sums{};
    if (Summed) sums.load(words);
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int64_t left = columns - j;
      Vec y[2];
      for (int64_t i = 0; i < (left > 16 ? 2 : 1); ++i) {
        const int64_t k = j + 16 * i;
        const Vec bias = block.bias == nullptr ? v_zero() : v_load(block.bias + column + k);
        y[i] = activated<Arch>(c, r, k, scales, bias, Gelu);
        if (Bare) store_some(bare + row * block.out_stride + out_place + k, y[i], columns - k);
        if (Residual) y[i] = v_add(y[i], load_some(added + k, columns - k));
        if (!Summed || left < kPanel) store_some(to + k, y[i], columns - k);
      }
      if (Summed && left >= kPanel) sums.put(to + j, y, column + j);
      if (Summed && left < kPanel) sums.add(to + j, column + j, left);
    }
    if (Summed) sums.store(words);
  }
}

using Finish = void (*)(const LinearBlock& block, int64_t first, int64_t rows, int64_t column,
                        int64_t columns, const float* c, int64_t c_stride, const Scales& scales,
                        float* row_sums);

template <class Arch, bool Gelu, bool Residual, bool Bare>
inline Finish finish_of(const LinearBlock& block) {
  return block.statistics != nullptr ? finish<Arch, Gelu, Residual, Bare, true>
                                     : finish<Arch, Gelu, Residual, Bare, false>;
}
template <class Arch>
inline Finish finish_of(const LinearBlock& block) {
  const bool residual = block.residual != nullptr;
  if (block.activation == Activation::kGelu) {
    return residual ? finish_of<Arch, true, true, false>(block)
                    : finish_of<Arch, true, false, false>(block);
  }
  if (block.bare != nullptr) {
    return residual ? finish_of<Arch, false, true, true>(block)
                    : finish_of<Arch, false, false, true>(block);
  }
  return residual ? finish_of<Arch, false, true, false>(block)
                  : finish_of<Arch, false, false, false>(block);
}

// Scales of so many rows and of the columns from `column` on, which lie behind the panels of their
// part of the weight.
inline Scales scales_of(const LinearBlock& block, int64_t column, int64_t panel_words,
                        const float* rows) {
  const int64_t width = block.part_panels * kPanel;
  const auto* const behind =
      reinterpret_cast<const float*>(block.parts[column / width] + block.part_panels * panel_words);
  return {rows, behind + column % width,
          reinterpret_cast<const int32_t*>(behind) + width + column % width};
}

// A tile's share of the block of B that comes next and lies behind the present one: the first tile
// would wait for each line of it. It is asked for in the course of tiles, if there are many only by
// their last quarter: when all rows have passed through a small L2, what came before is gone. Or at
// once between tiles, if they are so many that each has time to hide its share.
template <class Arch>
inline Ahead next_weights(const uint32_t* b, int64_t units, int64_t tile, int64_t tiles) {
  constexpr int64_t line = kCacheLine / static_cast<int64_t>(sizeof(uint32_t)), few = 4;
  Ahead ahead;
  if constexpr (Arch::kAsks == Asks::kByDepth) {
    ahead.lines = ceil_div(kAskUnits * kPanel / line, tiles);
    ahead.at = b + units / kAskUnits * ahead.lines * line * tile;
    return ahead;
  }
  if (Arch::kAsks == Asks::kBetweenTiles && tiles < few) return ahead;
  const int64_t some = min_of(tiles, max_of(few, tiles / 4));
  const int64_t askers = Arch::kAsks == Asks::kByParts ? some : tiles;
  const int64_t turn = tile - (tiles - askers), words = units * kPanel;
  if (turn < 0) return ahead;
  ahead.at = b + words * turn / askers;
  ahead.lines = ceil_div(words * (turn + 1) / askers - words * turn / askers, line);
  if constexpr (Arch::kAsks == Asks::kBetweenTiles) {
    ahead.ask();
    return {};
  }
  return ahead;
}

template <class Arch>
void linear_block(const LinearBlock& block, void* scratch) {
  using T = typename Arch::T;
  Carver carver(scratch);
  const LinearScratch own = carve_linear<Arch>(block, carver);
  const int64_t chunks = chunks_of<Arch>(block.in_features);
  const int64_t row_words = chunks * Arch::kRowWords;
  const int64_t panel_words = chunks * kChunk * kPanel;
  const int64_t tiles = ceil_div(block.count, Arch::kTileRows);

  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = tile_begin<Arch>(block.count, tiles, t);
    const int64_t end = tile_begin<Arch>(block.count, tiles, t + 1);
    const auto row = [&](int64_t r) {
      return static_cast<const T*>(block.x) +
             row_of(block, block.first + begin + r) * block.x_stride;
    };
    pack_rows<Arch>(row, block.first + begin, end - begin, block, own.a + begin * row_words,
                    own.row_scales + begin);
  }

  const Finish end_tile = finish_of<Arch>(block);
  const int64_t most = Arch::kEven ? ceil_div(block.count, tiles) : Arch::kTileRows;
  const int64_t units = ceil_div(block.in_features, Arch::kPerUnit);
  const int64_t depths = max_of(1, ceil_div(units, Arch::kDepthUnits));
  const int64_t last = min_of(block.panel_end * kPanel, block.out_features);
  typename Arch::State state;
  for (int64_t column = block.panel_begin * kPanel; column < last;) {
    const int64_t part = column / kPanel / block.part_panels;
    const int64_t part_begin = part * block.part_panels * kPanel;
    const int64_t part_end = min_of(last, part_begin + block.part_panels * kPanel);
    const int64_t vectors = Arch::vectors_at_once(most, part_end - column);
    const int64_t columns = min_of(vectors * 16, part_end - column);
    const int64_t c_stride = vectors * 16;
    const int64_t inside = column - part_begin;
    Scales scales = scales_of(block, column, panel_words, own.row_scales);
    for (int64_t d = 0; d < depths; ++d) {
      const int64_t from = chunks * d / depths, to = chunks * (d + 1) / depths;
      const uint32_t* const b =
          block.parts[part] + inside / kPanel * panel_words + from * kChunk * kPanel;
      const int64_t depth = min_of(units, to * kChunk) - from * kChunk;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = tile_begin<Arch>(block.count, tiles, t);
        const int64_t rows = tile_begin<Arch>(block.count, tiles, t + 1) - begin;
        // Sums that no later block of the depth adds to need no place of their own.
        float* const c = own.c + (depths > 1 ? begin * c_stride : 0);
        Ahead ahead;
        if (vectors <= 2) ahead = next_weights<Arch>(b + depth * kPanel, depth, t, tiles);
        if (d + 1 == depths) foresee<Arch>(block, block.first + begin, rows, column, columns);
        Arch::product(state, rows, vectors,
                      own.a + begin * row_words + from * rows * Arch::kRowWords, b, panel_words,
                      depth, c, c_stride, d > 0, ahead);
        if (d + 1 == depths) {
          scales.rows = own.row_scales + begin;
          end_tile(block, block.first + begin, rows, column, columns, c, c_stride, scales,
                   own.row_sums);
        }
      }
    }
    column += vectors * 16;
  }
  leave_statistics<Arch>(block, own.row_sums);
}

template <class Arch>
int64_t product_loop(const LinearBlock& block, int64_t repeats, void* scratch) {
  using T = typename Arch::T;
  Carver carver(scratch);
  const LinearScratch own = carve_linear<Arch>(block, carver);
  const int64_t rows = min_of(block.count, Arch::kTileRows);
  const auto row = [&](int64_t r) { return static_cast<const T*>(block.x) + r * block.x_stride; };
  pack_rows<Arch>(row, 0, rows, block, own.a, own.row_scales);
  const int64_t units = ceil_div(block.in_features, Arch::kPerUnit);
  const int64_t panel_words = chunks_of<Arch>(block.in_features) * kChunk * kPanel;
  const int64_t vectors = Arch::vectors_at_once(rows, block.out_features);
  typename Arch::State state;
  for (int64_t i = 0; i < repeats; ++i) {
    Arch::product(state, rows, vectors, own.a, block.parts[0], panel_words, units, own.c,
                  vectors * 16, false, {});
  }
  return rows * vectors * 16;
}

}  // namespace
