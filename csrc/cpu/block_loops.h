// The loops of both ops over one block, written once for every instruction-set level.
//
// Included once by each kernels_*.cpp, after a header that defines Vec and its functions. Arch
// gives
//   T            element type in memory (float, or uint16_t holding bf16)
//   kPerUnit     elements in a 4-byte unit of depth
//   kRowWords    words of A for one row of one chunk
//   kTileRows    most rows of a tile
//   kExpDegree   degree of the polynomial in exp2
//   moments      mean and variance in one pass over a row, or false where that would be inexact
//   put          converts one row chunk of A from fp32
//   copy         one row chunk of A from memory, of which `left` elements are there
//   put_sum      the same, and returns sum + the lanes of the rounded values
//   tile<M, V>   M rows of A times V vectors (16 columns) of B, V / 2 panels or half a panel, into
//   c
// Internal linkage throughout, and nothing of the standard library, for the reason in kernels.h.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace {

using beit3_fast::cpu::Activation;
using beit3_fast::cpu::AttentionBlock;
using beit3_fast::cpu::kChunk;
using beit3_fast::cpu::Kernels;
using beit3_fast::cpu::kPanel;
using beit3_fast::cpu::LinearBlock;
using beit3_fast::cpu::Mask;

constexpr int64_t kCacheLine = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

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

template <class T>
inline Vec load_some(const T* p, int64_t left) {
  return left >= 16 ? v_load(p) : left > 0 ? v_load_n(p, left) : v_zero();
}
template <class T>
inline void store_some(T* p, Vec a, int64_t left) {
  if (left >= 16) {
    v_store(p, a);
  } else {
    v_store_n(p, a, left);
  }
}

using Tile = void (*)(const uint32_t* a, const uint32_t* b, int64_t panel_words, int64_t units,
                      float* c, int64_t c_stride);

// How many vectors of columns a tile takes at once. Few rows leave few accumulators, fewer than the
// products in flight: they take several panels.
inline int64_t vectors_at_once(int64_t rows, int64_t columns) {
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

// The first `columns` columns of B against one tile of A; c is written in whole vectors.
template <class Arch>
inline void multiply(int64_t rows, const uint32_t* a, const uint32_t* b, int64_t columns,
                     int64_t panel_words, int64_t units, float* c, int64_t c_stride) {
  for (int64_t column = 0; column < columns;) {
    const int64_t vectors = vectors_at_once(rows, columns - column);
    choose_tile<Arch>(rows, vectors)(a, b + column / kPanel * panel_words, panel_words, units,
                                     c + column, c_stride);
    column += vectors * 16;
  }
}

// Mean and reciprocal standard deviation of a row as (pivot, shift, scale):
// (x - mean) / sqrt(var + eps) = (x - pivot) * scale + shift. The second pass measures the rounding
// of the mean found by the first, so that a mean far above the deviation costs no digits.
struct Norm {
  float pivot;
  float shift;
  float scale;
};

inline float inverse_deviation(float variance, float eps) {
  return 1.0f / __builtin_sqrtf((variance > 0.0f ? variance : variance * 0.0f) + eps);
}

template <class Arch>
inline Norm measure(const typename Arch::T* x, int64_t n, float eps) {
  float mean, quick;
  if (Arch::moments(x, n, &mean, &quick)) return {mean, 0.0f, inverse_deviation(quick, eps)};
  Vec sum[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int j = 0; j < 4; ++j) sum[j] = v_add(sum[j], v_load(x + i + 16 * j));
  }
  for (; i < n; i += 16) sum[0] = v_add(sum[0], load_some(x + i, n - i));
  const float count = static_cast<float>(n);
  const float pivot = v_sum(v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3]))) / count;

  const Vec centre = v_set(pivot);
  Vec first[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
  Vec second[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
  for (i = 0; i + 64 <= n; i += 64) {
    for (int j = 0; j < 4; ++j) {
      const Vec d = v_sub(v_load(x + i + 16 * j), centre);
      first[j] = v_add(first[j], d);
      second[j] = v_fma(d, d, second[j]);
    }
  }
  for (; i < n; i += 16) {
    const int64_t left = n - i;
    Vec d = v_sub(load_some(x + i, left), centre);
    if (left < 16) d = v_keep(d, left, 0.0f);
    first[0] = v_add(first[0], d);
    second[0] = v_fma(d, d, second[0]);
  }
  const float offset = v_sum(v_add(v_add(first[0], first[1]), v_add(first[2], first[3]))) / count;
  const float square =
      v_sum(v_add(v_add(second[0], second[1]), v_add(second[2], second[3]))) / count;
  const float scale = inverse_deviation(square - offset * offset, eps);
  return {pivot, -offset * scale, scale};
}

// Rows of a tile of A, normalised where norm_weight is given.
template <class Arch, class Row>
inline void pack_tile(const Row& row, int64_t rows, int64_t depth, const float* norm_weight,
                      const float* norm_bias, float eps, uint32_t* a) {
  const int64_t step = kChunk * Arch::kPerUnit;
  const int64_t chunk_words = rows * Arch::kRowWords;
  Norm norms[Arch::kTileRows];
  if (norm_weight != nullptr) {
    // First of all rows, so that the latencies at the end of one hide behind the loads of the next.
    for (int64_t r = 0; r < rows; ++r) norms[r] = measure<Arch>(row(r), depth, eps);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const typename Arch::T* const x = row(r);
    uint32_t* to = a + r * Arch::kRowWords;
    if (norm_weight == nullptr) {
      for (int64_t from = 0; from < depth; from += step, to += chunk_words) {
        Arch::copy(to, x + from, depth - from);
      }
      continue;
    }
    const Vec pivot = v_set(norms[r].pivot), shift = v_set(norms[r].shift);
    const Vec scale = v_set(norms[r].scale);
    for (int64_t from = 0; from < depth; from += step, to += chunk_words) {
      Vec part[Arch::kPerUnit];
      for (int j = 0; j < Arch::kPerUnit; ++j) {
        const int64_t at = from + 16 * j;
        const Vec y = v_fma(v_sub(load_some(x + at, depth - at), pivot), scale, shift);
        part[j] = v_fma(y, v_load(norm_weight + at), v_load(norm_bias + at));
      }
      Arch::put(to, part);
    }
  }
}

template <class Arch>
inline void carve_linear(const LinearBlock& block, Carver& carver, uint32_t** a, float** c) {
  *a = carver.take<uint32_t>(block.count * chunks_of<Arch>(block.in_features) * Arch::kRowWords);
  *c = carver.take<float>(Arch::kTileRows * 4 * kPanel);
}

template <class Arch>
int64_t linear_scratch(const LinearBlock& block) {
  Carver carver(nullptr);
  uint32_t* a;
  float* c;
  carve_linear<Arch>(block, carver, &a, &c);
  return carver.used();
}

inline int64_t row_of(const LinearBlock& block, int64_t sorted) {
  return block.rows == nullptr ? sorted : block.rows[sorted];
}

template <class T>
inline void foresee_row(const T* row, int64_t n) {
  if (row == nullptr) return;
  constexpr int64_t line = kCacheLine / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < n; j += line) __builtin_prefetch(row + j, 0);
  __builtin_prefetch(row + n - 1, 0);
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
    const T* const out = static_cast<const T*>(block.out) + row * block.out_stride + column;
    for (int64_t j = 0; j < columns; j += line) __builtin_prefetch(out + j, 1);
    if (block.residual == nullptr) continue;
    const T* const residual =
        static_cast<const T*>(block.residual) + row * block.residual_stride + column;
    for (int64_t j = 0; j < columns; j += line) __builtin_prefetch(residual + j, 0);
  }
}

// Bias, activation, residual and the store of one tile of products.
template <class Arch, bool Gelu, bool Residual>
inline void finish(const LinearBlock& block, int64_t first, int64_t rows, int64_t column,
                   int64_t columns, const float* c, int64_t c_stride) {
  using T = typename Arch::T;
  T* const out = static_cast<T*>(block.out);
  const T* const residual = static_cast<const T*>(block.residual);
  for (int64_t r = 0; r < rows; ++r, c += c_stride) {
    const int64_t row = row_of(block, first + r);
    T* const to = out + row * block.out_stride + column;
    for (int64_t j = 0; j < columns; j += 16) {
      Vec y = v_load(c + j);
      if (block.bias != nullptr) y = v_add(y, v_load(block.bias + column + j));
      if (Gelu) y = v_gelu(y);
      if (Residual) {
        y = v_add(y, load_some(residual + row * block.residual_stride + column + j, columns - j));
      }
      store_some(to + j, y, columns - j);
    }
  }
}

template <class Arch>
void linear_block(const LinearBlock& block, void* scratch) {
  using T = typename Arch::T;
  Carver carver(scratch);
  uint32_t* a;
  float* c;
  carve_linear<Arch>(block, carver, &a, &c);
  const int64_t chunks = chunks_of<Arch>(block.in_features);
  const int64_t row_words = chunks * Arch::kRowWords;
  const int64_t panel_words = chunks * kChunk * kPanel;
  const int64_t tiles = ceil_div(block.count, Arch::kTileRows);

  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = block.count * t / tiles, end = block.count * (t + 1) / tiles;
    const auto row = [&](int64_t r) {
      return static_cast<const T*>(block.x) +
             row_of(block, block.first + begin + r) * block.x_stride;
    };
    pack_tile<Arch>(row, end - begin, block.in_features, block.norm_weight, block.norm_bias,
                    block.eps, a + begin * row_words);
  }

  const int64_t most = ceil_div(block.count, tiles);
  const bool gelu = block.activation == Activation::kGelu;
  auto* const end_tile =
      gelu ? (block.residual ? finish<Arch, true, true> : finish<Arch, true, false>)
           : (block.residual ? finish<Arch, false, true> : finish<Arch, false, false>);
  const int64_t units = ceil_div(block.in_features, Arch::kPerUnit);
  const int64_t last = min_of(block.panel_end * kPanel, block.out_features);
  for (int64_t column = block.panel_begin * kPanel; column < last;) {
    const int64_t vectors = vectors_at_once(most, last - column);
    const int64_t columns = min_of(vectors * 16, last - column);
    const uint32_t* const b = block.packed + column / kPanel * panel_words;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = block.count * t / tiles, end = block.count * (t + 1) / tiles;

      choose_tile<Arch>(end - begin, vectors)(a + begin * row_words, b, panel_words, units, c,
                                              vectors * 16);
      end_tile(block, block.first + begin, end - begin, column, columns, c, vectors * 16);
    }
    column += vectors * 16;
  }
}

struct AttentionScratch {
  uint32_t* keys;    // panels of kPanel keys, depth head_dim
  uint32_t* values;  // panels of kPanel columns, depth keys
  uint32_t* q;       // a tile of A
  uint32_t* p;       // a tile of A, depth keys
  float* scores;     // [kTileRows, padded keys]
  float* out;        // [kTileRows, padded head_dim]
  int64_t used;
};

template <class Arch>
inline AttentionScratch carve_attention(const AttentionBlock& block, void* base) {
  Carver carver(base);
  const int64_t keys = ceil_div(block.vision_keys + block.text_keys, kPanel) * kPanel;
  const int64_t columns = ceil_div(block.head_dim, kPanel) * kPanel;
  const int64_t units = chunks_of<Arch>(block.head_dim) * kChunk;
  AttentionScratch s;
  s.keys = carver.take<uint32_t>(keys * units);
  s.values = carver.take<uint32_t>(keys / Arch::kPerUnit * columns);
  s.q = carver.take<uint32_t>(Arch::kTileRows * chunks_of<Arch>(block.head_dim) * Arch::kRowWords);
  s.p = carver.take<uint32_t>(Arch::kTileRows * chunks_of<Arch>(keys) * Arch::kRowWords);
  s.scores = carver.take<float>(Arch::kTileRows * keys);
  s.out = carver.take<float>(Arch::kTileRows * columns);
  s.used = carver.used();
  return s;
}

template <class Arch>
int64_t attention_scratch(const AttentionBlock& block) {
  return carve_attention<Arch>(block, nullptr).used;
}

template <class Arch>
inline void pack_keys_values(const AttentionBlock& block, const AttentionScratch& s) {
  using T = typename Arch::T;
  const int64_t keys = block.vision_keys + block.text_keys;
  const int64_t padded = ceil_div(keys, kPanel) * kPanel;
  const auto row = [&](const void* base, int64_t stride, int64_t key) -> const T* {
    if (key >= keys) return nullptr;
    const int64_t at = key < block.vision_keys ? block.key_vision_row + key
                                               : block.key_text_row + key - block.vision_keys;
    return static_cast<const T*>(base) + at * stride;
  };
  const int64_t panel_words = chunks_of<Arch>(block.head_dim) * kChunk * kPanel;
  for (int64_t key = 0; key < keys; key += kPanel) {
    const T* rows[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) {
      rows[j] = row(block.k, block.k_stride, key + j);
      foresee_row(row(block.k, block.k_stride, key + kPanel + j), block.head_dim);
      foresee_row(row(block.v, block.v_stride, key + j), block.head_dim);
    }
    v_pack_panel(rows, min_of(kPanel, keys - key), block.head_dim,
                 s.keys + key / kPanel * panel_words);
  }
  const int64_t units = padded / Arch::kPerUnit;
  for (int64_t unit = 0; unit < ceil_div(keys, Arch::kPerUnit); ++unit) {
    const T* const a = row(block.v, block.v_stride, unit * Arch::kPerUnit);
    const T* const b = row(block.v, block.v_stride, unit * Arch::kPerUnit + 1);
    for (int64_t from = 0; from < block.head_dim; from += kPanel) {
      v_pack_rows(a, b, from, block.head_dim, s.values + from * units + unit * kPanel);
    }
  }
}

template <class T>
inline float largest(const T* scores, int64_t count) {
  const Vec least = v_set(-__builtin_inff());
  Vec top[2] = {least, least};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    top[0] = v_max(top[0], v_load(scores + i));
    top[1] = v_max(top[1], v_load(scores + i + 16));
  }
  for (; i < count; i += 16) {
    const int64_t left = count - i;
    const Vec x = v_load(scores + i);
    top[0] = v_max(top[0], left < 16 ? v_keep(x, left, -__builtin_inff()) : x);
  }
  return v_top(v_max(top[0], top[1]));
}

// Weights 2^((score - top) * factor) of the first `visible` scores of a row as a row of A; the rest
// of `keys` is zero, to the end of its last chunk. Returns the sum of the rounded weights.
template <class Arch>
inline float soften(const float* scores, int64_t visible, int64_t keys, float top, float factor,
                    uint32_t* a, int64_t chunk_words) {
  const int64_t step = kChunk * Arch::kPerUnit;
  const Vec highest = v_set(top), slope = v_set(factor);
  Vec sum = v_zero();
  Vec part[Arch::kPerUnit];
  int64_t i = 0;
  for (; i + step <= visible; i += step, a += chunk_words) {
    for (int j = 0; j < Arch::kPerUnit; ++j) {
      const Vec x = v_sub(v_load(scores + i + 16 * j), highest);
      part[j] = v_exp2<Arch::kExpDegree>(v_mul(x, slope));
    }
    sum = Arch::put_sum(a, part, sum);
  }
  for (; i < keys; i += step, a += chunk_words) {
    for (int j = 0; j < Arch::kPerUnit; ++j) {
      const int64_t left = visible - i - 16 * j;
      part[j] = v_zero();
      if (left <= 0) continue;
      const Vec x = v_sub(v_load(scores + i + 16 * j), highest);
      part[j] = v_exp2<Arch::kExpDegree>(v_mul(x, slope));
      if (left < 16) part[j] = v_keep(part[j], left, 0.0f);
    }
    sum = Arch::put_sum(a, part, sum);
  }
  return v_sum(sum);
}

inline int64_t query_row(const AttentionBlock& block, int64_t query) {
  return query < block.vision_queries ? block.query_vision_row + query
                                      : block.query_text_row + query - block.vision_queries;
}

// How many of a sample's keys (vision first) a query sees: always a prefix of them.
inline int64_t visible_keys(const AttentionBlock& block, int64_t query, int64_t row) {
  const bool text = query >= block.vision_queries;
  int64_t position = text ? query - block.vision_queries : query;
  if (block.positions != nullptr) position = block.positions[row];
  switch (block.mask) {
    case Mask::kSeq2Seq:
      return text ? block.vision_keys + min_of(position + 1, block.text_keys) : block.vision_keys;
    case Mask::kCausal:
      return text ? block.vision_keys + min_of(position + 1, block.text_keys)
                  : min_of(position + 1, block.vision_keys);
    default:
      return block.vision_keys + block.text_keys;
  }
}

template <class Arch>
void attention_block(const AttentionBlock& block, void* scratch) {
  using T = typename Arch::T;
  const AttentionScratch s = carve_attention<Arch>(block, scratch);
  pack_keys_values<Arch>(block, s);

  const int64_t keys = ceil_div(block.vision_keys + block.text_keys, kPanel) * kPanel;
  const int64_t depth_units = ceil_div(block.head_dim, Arch::kPerUnit);
  const int64_t key_panel_words = chunks_of<Arch>(block.head_dim) * kChunk * kPanel;
  const int64_t value_panel_words = keys / Arch::kPerUnit * kPanel;
  const int64_t columns = ceil_div(block.head_dim, kPanel) * kPanel;
  const float factor = block.scale * 1.44269504088896341f;

  const int64_t queries = block.end - block.begin;
  const int64_t tiles = ceil_div(queries, Arch::kTileRows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = block.begin + queries * t / tiles;
    const int64_t rows = block.begin + queries * (t + 1) / tiles - begin;
    const int64_t chunk_words = rows * Arch::kRowWords;
    int64_t at[Arch::kTileRows];
    int64_t visible[Arch::kTileRows];
    int64_t most = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t query = begin + r;
      at[r] = query_row(block, query);
      visible[r] = visible_keys(block, query, at[r]);
      most = max_of(most, visible[r]);
    }
    const auto row = [&](int64_t r) {
      return static_cast<const T*>(block.q) + at[r] * block.q_stride;
    };
    pack_tile<Arch>(row, rows, block.head_dim, nullptr, nullptr, 0.0f, s.q);
    for (int64_t r = 0; r < rows && begin + rows + r < block.end; ++r) {
      const int64_t query = begin + rows + r;
      foresee_row(static_cast<const T*>(block.q) + query_row(block, query) * block.q_stride,
                  block.head_dim);
    }
    multiply<Arch>(rows, s.q, s.keys, most, key_panel_words, depth_units, s.scores, keys);
    float tops[Arch::kTileRows], sums[Arch::kTileRows];
    for (int64_t r = 0; r < rows; ++r) tops[r] = largest(s.scores + r * keys, visible[r]);
    for (int64_t r = 0; r < rows; ++r) {
      sums[r] = soften<Arch>(s.scores + r * keys, visible[r], most, tops[r], factor,
                             s.p + r * Arch::kRowWords, chunk_words);
    }
    multiply<Arch>(rows, s.p, s.values, block.head_dim, value_panel_words,
                   ceil_div(most, Arch::kPerUnit), s.out, columns);
    for (int64_t r = 0; r < rows; ++r) {
      T* const out = static_cast<T*>(block.out) + at[r] * block.out_stride;
      const Vec share = v_set(visible[r] > 0 ? 1.0f / sums[r] : 0.0f);
      for (int64_t j = 0; j < block.head_dim; j += 16) {
        // Nothing visible is zero, also where an invisible value is not finite.
        const Vec y = visible[r] > 0 ? v_mul(v_load(s.out + r * columns + j), share) : v_zero();
        store_some(out + j, y, block.head_dim - j);
      }
    }
  }
}

template <class Arch>
int64_t row_bytes(int64_t depth) {
  return chunks_of<Arch>(depth) * Arch::kRowWords * 4;
}

template <class Arch>
void pack_panel(const void* const* rows, int64_t count, int64_t depth, uint32_t* panel) {
  const typename Arch::T* typed[kPanel];
  for (int64_t j = 0; j < kPanel; ++j) {
    typed[j] = j < count ? static_cast<const typename Arch::T*>(rows[j]) : nullptr;
  }
  v_pack_panel(typed, count, depth, panel);
}

template <class Arch>
constexpr Kernels make_kernels(const char* isa) {
  return {isa,
          Arch::kTileRows,
          row_bytes<Arch>,
          linear_scratch<Arch>,
          linear_block<Arch>,
          attention_scratch<Arch>,
          attention_block<Arch>,
          pack_panel<Arch>};
}

}  // namespace
