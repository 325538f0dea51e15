// The gradients of one head of one sample of shared_attention, for every Arch (tile_loops.h).
//
// A first pass over the queries finds the top and sum of each softmax and the gradient of q; a
// second one over the keys computes the same weights the other way round, so that nothing is
// transposed and sums over queries stay in fp32 until they are stored.
#pragma once

#include "attention_loops.h"

namespace {

struct GradientScratch {
  uint32_t* keys;           // panels of keys, depth head_dim
  uint32_t* values;         // likewise
  uint32_t* key_columns;    // panels of columns, depth keys
  uint32_t* queries;        // panels of queries, depth head_dim
  uint32_t* grads;          // likewise, of the result's gradient
  uint32_t* query_columns;  // panels of columns, depth queries
  uint32_t* grad_columns;
  uint32_t* rows;  // two tiles of A, depth head_dim
  uint32_t* other_rows;
  uint32_t* weights;  // two tiles of A, depth keys or queries
  uint32_t* changes;
  float* scores;  // [kTileRows, places]
  float* slopes;  // likewise: gradients of the weights
  float* out;     // [kTileRows, padded head_dim]
  // Of each query: its highest score, infinite where it sees no key; 1 / the sum of its weights;
  // the mean slope; how many keys, vision first, the mask lets it see.
  float* top;
  float* share;
  float* mean;
  int32_t* visible;
  float* seen_top;  // of one key: the tops of the queries that see it, of others infinity
  int64_t used;
};

template <class Arch>
inline GradientScratch carve_gradients(const AttentionGradientsBlock& block, void* base) {
  Carver carver(base);
  const int64_t keys = block.vision_keys + block.text_keys;
  const int64_t queries = block.vision_queries + block.text_queries;
  const int64_t places = ceil_div(max_of(keys, queries), kPanel) * kPanel;
  const int64_t columns = ceil_div(block.head_dim, kPanel) * kPanel;
  const int64_t deep = chunks_of<Arch>(block.head_dim) * kChunk;
  const auto panels = [&](int64_t count, int64_t units) {
    return carver.take<uint32_t>(ceil_div(count, kPanel) * kPanel * units);
  };
  const auto tile = [&](int64_t depth) {
    return carver.take<uint32_t>(Arch::kTileRows * chunks_of<Arch>(depth) * Arch::kRowWords);
  };
  GradientScratch s;
  s.keys = panels(keys, deep);
  s.values = panels(keys, deep);
  s.key_columns = panels(columns, chunks_of<Arch>(keys) * kChunk);
  s.queries = panels(queries, deep);
  s.grads = panels(queries, deep);
  s.query_columns = panels(columns, chunks_of<Arch>(queries) * kChunk);
  s.grad_columns = panels(columns, chunks_of<Arch>(queries) * kChunk);
  s.rows = tile(block.head_dim);
  s.other_rows = tile(block.head_dim);
  s.weights = tile(places);
  s.changes = tile(places);
  s.scores = carver.take<float>(Arch::kTileRows * places);
  s.slopes = carver.take<float>(Arch::kTileRows * places);
  s.out = carver.take<float>(Arch::kTileRows * columns);
  s.top = carver.take<float>(places);
  s.share = carver.take<float>(places);
  s.mean = carver.take<float>(places);
  s.visible = carver.take<int32_t>(places);
  s.seen_top = carver.take<float>(places);
  s.used = carver.used();
  return s;
}

template <class Arch>
int64_t gradients_scratch(const AttentionGradientsBlock& block) {
  return carve_gradients<Arch>(block, nullptr).used;
}

// Row r of a tile of A out of fp32 vectors values(i) of places i to i + 16; those from `count` on
// are zero, to the end of the last chunk.
template <class Arch, class Values>
inline void put_row(const Values& values, int64_t count, uint32_t* a, int64_t chunk_words) {
  const int64_t step = kChunk * Arch::kPerUnit;
  for (int64_t i = 0; i < count; i += step, a += chunk_words) {
    Vec part[Arch::kPerUnit] = {};
    for (int j = 0; j < Arch::kPerUnit; ++j) {
      const int64_t at = i + 16 * j, left = count - at;
      if (left > 0) part[j] = left < 16 ? v_keep(values(at), left, 0.0f) : values(at);
    }
    Arch::put(a, part);
  }
}

template <class T>
inline void store_row(const float* out, int64_t width, T* to) {
  for (int64_t j = 0; j < width; j += 16) store_some(to + j, v_load(out + j), width - j);
}

// The softmax of a query's scores, its top, share and mean slope, and the gradient of its scores as
// a row of A over the first `most` keys.
template <class Arch>
inline void differentiate(const GradientScratch& s, float* scores, const float* slopes,
                          int64_t query, int64_t visible, int64_t most, float factor, float scale,
                          uint32_t* a, int64_t chunk_words) {
  const float top = largest(scores, visible);
  const Vec highest = v_set(top), slope = v_set(factor);
  Vec sum = v_zero(), met = v_zero();
  for (int64_t i = 0; i < most; i += 16) {
    const int64_t left = visible - i;
    Vec weight = v_zero();
    if (left > 0) {
      weight = v_exp2<Arch::kExpDegree>(v_mul(v_sub(v_load(scores + i), highest), slope));
      if (left < 16) weight = v_keep(weight, left, 0.0f);
      sum = v_add(sum, weight);
      met = v_fma(weight, left < 16 ? v_keep(v_load(slopes + i), left, 0.0f) : v_load(slopes + i),
                  met);
    }
    v_store(scores + i, weight);
  }
  const float total = v_sum(sum);
  s.top[query] = top;
  s.share[query] = 1.0f / total;
  s.mean[query] = v_sum(met) / total;
  const Vec mean = v_set(s.mean[query]), share = v_set(scale / total);
  const auto change = [&](int64_t i) {
    if (i >= visible) return v_zero();
    const Vec own = v_mul(v_mul(v_load(scores + i), share), v_sub(v_load(slopes + i), mean));
    return visible - i < 16 ? v_keep(own, visible - i, 0.0f) : own;
  };
  put_row<Arch>(change, most, a, chunk_words);
}

// Tops of the queries that see a key; those of the others make their weights zero.
inline const float* tops_of(const AttentionGradientsBlock& block, const GradientScratch& s,
                            int64_t key, int64_t queries) {
  if (block.mask == Mask::kBidirectional && block.seen == nullptr) return s.top;
  const float none = __builtin_inff();
  for (int64_t i = 0; i < queries; ++i) s.seen_top[i] = key < s.visible[i] ? s.top[i] : none;
  if (block.seen == nullptr) return s.seen_top;
  const int64_t place = key < block.vision_keys ? key : block.seen_text + key - block.vision_keys;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t first = i < block.vision_queries ? 0 : block.seen_text;
    const int64_t row = first + position_of(block, i, query_row(block, i));
    if (block.seen[row * block.seen_stride + place] == 0) s.seen_top[i] = none;
  }
  return s.seen_top;
}

template <class Arch>
void gradients_block(const AttentionGradientsBlock& block, void* scratch) {
  using T = typename Arch::T;
  const GradientScratch s = carve_gradients<Arch>(block, scratch);
  const int64_t keys = block.vision_keys + block.text_keys;
  const int64_t queries = block.vision_queries + block.text_queries;
  const int64_t width = block.head_dim;
  const int64_t places = ceil_div(max_of(keys, queries), kPanel) * kPanel;
  const int64_t columns = ceil_div(width, kPanel) * kPanel;
  const int64_t deep_words = chunks_of<Arch>(width) * kChunk * kPanel;
  const int64_t deep_units = ceil_div(width, Arch::kPerUnit);
  const float log2e = 1.44269504088896341f;

  const auto k = [&](int64_t key) {
    return static_cast<const T*>(block.k) + key_row(block, key) * block.k_stride;
  };
  const auto v = [&](int64_t key) {
    return static_cast<const T*>(block.v) + key_row(block, key) * block.v_stride;
  };
  const auto q = [&](int64_t query) {
    return static_cast<const T*>(block.q) + query_row(block, query) * block.q_stride;
  };
  const auto grad = [&](int64_t query) {
    return static_cast<const T*>(block.grad) + query_row(block, query) * block.grad_stride;
  };
  const auto as_columns = [&](const auto& row, int64_t count, uint32_t* panels) {
    pack_as_columns<Arch>(row, count, width, panels, [&](int64_t i) {
      if (i + kPanel < count) foresee_row(row(i + kPanel), width);
    });
  };
  const auto as_depth = [&](const auto& row, int64_t count, uint32_t* panels) {
    pack_as_depth<Arch>(row, count, width, chunks_of<Arch>(count) * kChunk, panels);
  };
  as_columns(k, keys, s.keys);
  as_columns(v, keys, s.values);
  as_depth(k, keys, s.key_columns);
  as_columns(q, queries, s.queries);
  as_columns(grad, queries, s.grads);
  as_depth(q, queries, s.query_columns);
  as_depth(grad, queries, s.grad_columns);

  typename Arch::State state;
  // With `seen`, scores are scaled before the highest is found.
  const float factor = (block.seen != nullptr ? 1.0f : block.scale) * log2e;
  const int64_t query_tiles = ceil_div(queries, Arch::kTileRows);
  for (int64_t t = 0; t < query_tiles; ++t) {
    const int64_t begin = tile_begin<Arch>(queries, query_tiles, t);
    const int64_t rows = tile_begin<Arch>(queries, query_tiles, t + 1) - begin;
    const int64_t chunk_words = rows * Arch::kRowWords;
    int64_t most = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t own = visible_keys(block, begin + r, query_row(block, begin + r));
      s.visible[begin + r] = static_cast<int32_t>(own);
      most = max_of(most, own);
    }
    const auto from = [&](const auto& of) {
      return [&, begin](int64_t r) { return of(begin + r); };
    };
    pack_tile<Arch>(from(q), rows, width, nullptr, nullptr, no_norm, s.rows);
    pack_tile<Arch>(from(grad), rows, width, nullptr, nullptr, no_norm, s.other_rows);
    multiply<Arch>(state, rows, s.rows, s.keys, most, deep_words, deep_units, s.scores, places);
    multiply<Arch>(state, rows, s.other_rows, s.values, most, deep_words, deep_units, s.slopes,
                   places);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t query = begin + r;
      float* const scores = s.scores + r * places;
      if (block.seen != nullptr &&
          !hide_unseen(block, query, query_row(block, query), {0, s.visible[query]}, scores)) {
        s.visible[query] = 0;
      }
      uint32_t* const a = s.changes + r * Arch::kRowWords;
      if (s.visible[query] == 0) {
        s.top[query] = __builtin_inff();
        s.share[query] = s.mean[query] = 0.0f;
        put_row<Arch>([](int64_t) { return v_zero(); }, most, a, chunk_words);
        continue;
      }
      differentiate<Arch>(s, scores, s.slopes + r * places, query, s.visible[query], most, factor,
                          block.scale, a, chunk_words);
    }
    multiply<Arch>(state, rows, s.changes, s.key_columns, width,
                   chunks_of<Arch>(keys) * kChunk * kPanel, ceil_div(most, Arch::kPerUnit), s.out,
                   columns);
    for (int64_t r = 0; r < rows; ++r) {
      T* const to = static_cast<T*>(block.q_grad) + query_row(block, begin + r) * block.grad_width;
      store_row(s.out + r * columns, width, to);
    }
  }

  // Rounded as in the first pass: the weight of a top is one share to the last bit.
  const Vec first = v_set(block.seen != nullptr ? block.scale : 1.0f);
  // A scale of zero must not meet the infinite tops of queries that see no key.
  const Vec slope = v_set(factor > __FLT_MIN__ ? factor : __FLT_MIN__), scale = v_set(block.scale);
  const int64_t key_tiles = ceil_div(keys, Arch::kTileRows);
  const int64_t query_units = ceil_div(queries, Arch::kPerUnit);
  const int64_t query_words = chunks_of<Arch>(queries) * kChunk * kPanel;
  for (int64_t t = 0; t < key_tiles; ++t) {
    const int64_t begin = tile_begin<Arch>(keys, key_tiles, t);
    const int64_t rows = tile_begin<Arch>(keys, key_tiles, t + 1) - begin;
    const int64_t chunk_words = rows * Arch::kRowWords;
    const auto from = [&](const auto& of) {
      return [&, begin](int64_t r) { return of(begin + r); };
    };
    pack_tile<Arch>(from(k), rows, width, nullptr, nullptr, no_norm, s.rows);
    pack_tile<Arch>(from(v), rows, width, nullptr, nullptr, no_norm, s.other_rows);
    multiply<Arch>(state, rows, s.rows, s.queries, queries, deep_words, deep_units, s.scores,
                   places);
    multiply<Arch>(state, rows, s.other_rows, s.grads, queries, deep_words, deep_units, s.slopes,
                   places);
    for (int64_t r = 0; r < rows; ++r) {
      float* const scores = s.scores + r * places;
      const float* const slopes = s.slopes + r * places;
      const float* const tops = tops_of(block, s, begin + r, queries);
      for (int64_t i = 0; i < queries; i += 16) {
        const Vec score = v_mul(v_load(scores + i), first);
        const Vec x = v_mul(v_sub(score, v_load(tops + i)), slope);
        v_store(scores + i, v_mul(v_exp2<Arch::kExpDegree>(x), v_load(s.share + i)));
      }
      const auto weight = [&](int64_t i) { return v_load(scores + i); };
      const auto change = [&](int64_t i) {
        const Vec own = v_sub(v_load(slopes + i), v_load(s.mean + i));
        return v_mul(v_mul(weight(i), scale), own);
      };
      put_row<Arch>(weight, queries, s.weights + r * Arch::kRowWords, chunk_words);
      put_row<Arch>(change, queries, s.changes + r * Arch::kRowWords, chunk_words);
    }
    const auto finish = [&](const uint32_t* a, const uint32_t* b, void* to) {
      multiply<Arch>(state, rows, a, b, width, query_words, query_units, s.out, columns);
      for (int64_t r = 0; r < rows; ++r) {
        store_row(s.out + r * columns, width,
                  static_cast<T*>(to) + key_row(block, begin + r) * block.grad_width);
      }
    };
    finish(s.weights, s.grad_columns, block.v_grad);
    finish(s.changes, s.query_columns, block.k_grad);
  }
}

}  // namespace
