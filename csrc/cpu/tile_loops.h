// What both ops are made of: operands in tiles and panels, and the product of them.
//
// Arch describes an instruction-set level and a dtype:
//   T            element type in memory (float, or uint16_t holding bf16)
//   kPerUnit     elements in a 4-byte unit of depth
//   kRowWords    words of A for one row of one chunk
//   kTileRows    most rows of a tile
//   kEven        whether rows are dealt out evenly to tiles, or all tiles but the last are full
//   kAsks        when the block of B that comes next is asked for
//   kDepthUnits  most units of depth of a block of B, which should stay in the nearest cache
//   kExpDegree   degree of the polynomial in exp2
//   Sums         the sums that statistics of a row are made of (row_statistics.h)
//   put          converts one row chunk of A from fp32
//   copy         one row chunk of A from memory, of which `left` elements are there
//   put_sum      the same, and returns sum + the lanes of the rounded values
//   kInt8        whether B is int8 and rows are rounded to int8 by their own scales; then
//                put_int8 takes the place of put, copy and put_sum, sums in c are int32, and
//                kUnsigned says whether A holds its numbers plus 128
//   State        what a thread sets up before its first product and gives back after its last
//   vectors_at_once, product   how many vectors (16 columns) of B one product takes, and the
//   product
// OfTiles gives the last three to an Arch with
//   tile<M, V>   M rows of A times V vectors of B: V / 2 panels, or half a panel
// Internal linkage throughout, and nothing of the standard library, for the reason in kernels.h.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "row_statistics.h"

namespace {

using beit3_fast::cpu::Activation;
using beit3_fast::cpu::AttentionBlock;
using beit3_fast::cpu::AttentionGradientsBlock;
using beit3_fast::cpu::kChunk;
using beit3_fast::cpu::Kernels;
using beit3_fast::cpu::LinearBlock;
using beit3_fast::cpu::LinearKernels;
using beit3_fast::cpu::LogitsBlock;
using beit3_fast::cpu::LogitsSummary;
using beit3_fast::cpu::Mask;
using beit3_fast::cpu::NormBlock;
using beit3_fast::cpu::NormGradientsBlock;
using beit3_fast::cpu::StatisticsBlock;

constexpr int64_t kCacheLine = 64;

template <class Arch>
inline int64_t chunks_of(int64_t depth) {
  return ceil_div(depth, kChunk * Arch::kPerUnit);
}

// Carves aligned arrays out of a scratch area; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(reinterpret_cast<uintptr_t>(base)), at_(base_) {}
  template <class U>
  U* take(int64_t count) {
    U* const here = reinterpret_cast<U*>(at_);
    at_ += static_cast<uintptr_t>(ceil_div(count * static_cast<int64_t>(sizeof(U)), kCacheLine) *
                                  kCacheLine);
    return here;
  }
  int64_t used() const { return static_cast<int64_t>(at_ - base_); }

 private:
  uintptr_t base_;
  uintptr_t at_;
};

// Memory is asked for between tiles; by products, so many lines for every kAskUnits units of their
// depth; or by the parts of a tile together, so many lines in all.
enum class Asks { kBetweenTiles, kByDepth, kByParts };
constexpr int64_t kAskUnits = 4;

struct Ahead {
  const uint32_t* at = nullptr;
  int64_t lines = 0;

  void ask() {
    constexpr int64_t line = kCacheLine / static_cast<int64_t>(sizeof(uint32_t));
    for (int64_t i = 0; i < lines; ++i, at += line) __builtin_prefetch(at, 0, 2);
  }
};

// Products of one tile of A and some columns of B; with `more` they are added to c.
using Tile = void (*)(const uint32_t* a, const uint32_t* b, int64_t panel_words, int64_t units,
                      float* c, int64_t c_stride, bool more, Ahead ahead);

// How many vectors of columns a tile of registers takes at once. Few rows leave few accumulators,
// fewer than the products in flight: they take several panels.
inline int64_t vectors_of_tiles(int64_t rows, int64_t columns) {
  if (columns <= 16) return 1;
  if (rows <= 3 && columns > 3 * kPanel) return 8;
  if (rows <= 6 && columns > kPanel) return 4;
  return 2;
}

template <class Arch>
inline Tile choose_tile(int64_t rows, int64_t vectors) {
  static constexpr Tile half[] = {nullptr,
                                  Arch::template tile<1, 1>,
                                  Arch::template tile<2, 1>,
                                  Arch::template tile<3, 1>,
                                  Arch::template tile<4, 1>,
                                  Arch::template tile<5, 1>,
                                  Arch::template tile<6, 1>,
                                  Arch::template tile<7, 1>,
                                  Arch::template tile<8, 1>,
                                  Arch::template tile<9, 1>,
                                  Arch::template tile<10, 1>,
                                  Arch::template tile<11, 1>,
                                  Arch::template tile<12, 1>};
  static constexpr Tile one[] = {nullptr,
                                 Arch::template tile<1, 2>,
                                 Arch::template tile<2, 2>,
                                 Arch::template tile<3, 2>,
                                 Arch::template tile<4, 2>,
                                 Arch::template tile<5, 2>,
                                 Arch::template tile<6, 2>,
                                 Arch::template tile<7, 2>,
                                 Arch::template tile<8, 2>,
                                 Arch::template tile<9, 2>,
                                 Arch::template tile<10, 2>,
                                 Arch::template tile<11, 2>,
                                 Arch::template tile<12, 2>};
  static constexpr Tile two[] = {nullptr,
                                 Arch::template tile<1, 4>,
                                 Arch::template tile<2, 4>,
                                 Arch::template tile<3, 4>,
                                 Arch::template tile<4, 4>,
                                 Arch::template tile<5, 4>,
                                 Arch::template tile<6, 4>};
  static constexpr Tile four[] = {nullptr, Arch::template tile<1, 8>, Arch::template tile<2, 8>,
                                  Arch::template tile<3, 8>};
  switch (vectors) {
    case 1:
      return half[rows];
    case 2:
      return one[rows];
    case 4:
      return two[rows];
    default:
      return four[rows];
  }
}

// The first `columns` columns of B against one tile of A; c is written in whole vectors. With
// `more` the products are added to it.
template <class Arch>
inline void multiply(typename Arch::State& state, int64_t rows, const uint32_t* a,
                     const uint32_t* b, int64_t columns, int64_t panel_words, int64_t units,
                     float* c, int64_t c_stride, bool more = false) {
  for (int64_t column = 0; column < columns;) {
    const int64_t vectors = Arch::vectors_at_once(rows, columns - column);
    Arch::product(state, rows, vectors, a, b + column / kPanel * panel_words, panel_words, units,
                  c + column, c_stride, more, {});
    column += vectors * 16;
  }
}

template <class Arch>
struct OfTiles {
  struct State {};
  static constexpr bool kEven = true;
  static constexpr bool kInt8 = false;
  static constexpr Asks kAsks = Asks::kBetweenTiles;
  static int64_t vectors_at_once(int64_t rows, int64_t columns) {
    return vectors_of_tiles(rows, columns);
  }
  static void product(State&, int64_t rows, int64_t vectors, const uint32_t* a, const uint32_t* b,
                      int64_t panel_words, int64_t units, float* c, int64_t c_stride, bool more,
                      Ahead ahead) {
    choose_tile<Arch>(rows, vectors)(a, b, panel_words, units, c, c_stride, more, ahead);
  }
};

// What Archs with int8 weights have in common, whatever their rows.
template <class Element, class Base>
struct OfInt8 : Base {
  using T = Element;
  static constexpr bool kInt8 = true;
  static constexpr bool kUnsigned = false;
  static constexpr int kPerUnit = 4;
  static constexpr int kTileRows = 12;
  using Sums = LaneSums;
};

// First row of tile t of the `tiles` tiles of `count` rows.
template <class Arch>
inline int64_t tile_begin(int64_t count, int64_t tiles, int64_t t) {
  return Arch::kEven ? count * t / tiles : min_of(count, t * Arch::kTileRows);
}

template <class T>
inline void foresee_row(const T* row, int64_t n) {
  if (row == nullptr) return;
  constexpr int64_t line = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < n; j += line) __builtin_prefetch(row + j, 0);
  __builtin_prefetch(row + n - 1, 0);
}

inline Vec centred(Vec values, const Norm& norm) {
  return v_fma(v_sub(values, v_set(norm.pivot)), v_set(norm.scale), v_set(norm.shift));
}

// Values [from, from + 16) of a row, which lie at x, normalised where norm_weight is given.
template <class T>
inline Vec normal_values(const T* x, int64_t from, int64_t depth, const Norm& norm,
                         const float* norm_weight, const float* norm_bias) {
  const Vec values = load_some(x, depth - from);
  if (norm_weight == nullptr) return values;
  return v_fma(centred(values, norm), v_load(norm_weight + from), v_load(norm_bias + from));
}

// How a row that meets int8 weights is rounded: 127 parts of its largest number, normalised where
// norm_weight is given. A row with a number that is not finite gets NaN as its scale.
struct Rounding {
  float scale;
  float inverse;
};

template <class Row>
inline Rounding measure_rounding(const Row& x, int64_t depth, const Norm& norm,
                                 const float* norm_weight, const float* norm_bias) {
  Vec top = v_zero(), poison = v_zero();
  for (int64_t i = 0; i < depth; i += 16) {
    const Vec y = normal_values(at(x, i), i, depth, norm, norm_weight, norm_bias);
    top = v_max(top, v_max(y, v_sub(v_zero(), y)));
    poison = v_fma(y, v_zero(), poison);
  }
  const float largest = v_top(top);
  // Rows of zeros, and numbers so small that the quotient overflows, become zeros.
  return {largest / 127.0f + v_sum(poison), largest > 1e-36f ? 127.0f / largest : 0.0f};
}

// Chunks [begin, end) of a row of A, rounded to int8; from one chunk to the next `a` goes on by
// `chunk_words`.
template <class Arch, class Row>
inline void put_int8_row(const Row& x, int64_t depth, int64_t begin, int64_t end, const Norm& norm,
                         const float* norm_weight, const float* norm_bias, float inverse,
                         uint32_t* a, int64_t chunk_words) {
  constexpr int64_t step = kChunk * Arch::kPerUnit;
  const Vec factor = v_set(inverse);
  for (int64_t from = begin * step; from < end * step; from += step, a += chunk_words) {
    const auto* const values = at(x, from);
    Vec part[4];
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t i = from + 16 * j;
      part[j] = i < depth
                    ? v_mul(normal_values(values + 16 * j, i, depth, norm, norm_weight, norm_bias),
                            factor)
                    : v_zero();
    }
    Arch::put_int8(a, part);
  }
}

// The same as it is, normalised where norm_weight is given.
template <class Arch, class Row>
inline void put_row(const Row& x, int64_t depth, int64_t begin, int64_t end, const Norm& norm,
                    const float* norm_weight, const float* norm_bias, uint32_t* a,
                    int64_t chunk_words) {
  constexpr int64_t step = kChunk * Arch::kPerUnit;
  if (norm_weight == nullptr) {  // numbers that need not pass through fp32
    for (int64_t from = begin * step; from < end * step; from += step, a += chunk_words) {
      Arch::copy(a, at(x, from), depth - from);
    }
    return;
  }
  for (int64_t from = begin * step; from < end * step; from += step, a += chunk_words) {
    const auto* const values = at(x, from);
    Vec part[Arch::kPerUnit];
    for (int j = 0; j < Arch::kPerUnit; ++j) {
      part[j] = normal_values(values + 16 * j, from + 16 * j, depth, norm, norm_weight, norm_bias);
    }
    Arch::put(a, part);
  }
}

// Rows of a tile of A, normalised by norm(r) where norm_weight is given.
template <class Arch, class Row, class NormOf>
inline void pack_tile(const Row& row, int64_t rows, int64_t depth, const float* norm_weight,
                      const float* norm_bias, const NormOf& norm, uint32_t* a) {
  Norm norms[Arch::kTileRows] = {};
  if (norm_weight != nullptr) {
    // First of all rows, so that the latencies at the end of one hide behind the loads of the next.
    for (int64_t r = 0; r < rows; ++r) norms[r] = norm(r);
  }
  for (int64_t r = 0; r < rows; ++r) {
    put_row<Arch>(row(r), depth, 0, chunks_of<Arch>(depth), norms[r], norm_weight, norm_bias,
                  a + r * Arch::kRowWords, rows * Arch::kRowWords);
  }
}

// The same rounded to int8, and the scales of the rows.
template <class Arch, class Row, class NormOf>
inline void pack_int8_tile(const Row& row, int64_t rows, int64_t depth, const float* norm_weight,
                           const float* norm_bias, const NormOf& norm, uint32_t* a, float* scales) {
  for (int64_t r = 0; r < rows; ++r) {
    const typename Arch::T* const x = row(r);
    const Norm own = norm_weight == nullptr ? Norm{} : norm(r);
    const Rounding rounding = measure_rounding(x, depth, own, norm_weight, norm_bias);
    scales[r] = rounding.scale;
    put_int8_row<Arch>(x, depth, 0, chunks_of<Arch>(depth), own, norm_weight, norm_bias,
                       rounding.inverse, a + r * Arch::kRowWords, rows * Arch::kRowWords);
  }
}

}  // namespace
