// The loops of shared_attention over one block, for every Arch (tile_loops.h).
#pragma once

#include "tile_loops.h"

namespace {

// Keys that all queries meet before any meets the next: packed, they and the scores of a tile of
// queries stay in the L2 cache.
template <class Arch>
constexpr int64_t kKeysAtOnce = 1024 * Arch::kPerUnit;

struct AttentionScratch {
  uint32_t* keys;    // panels of kPanel keys, depth head_dim
  uint32_t* values;  // panels of kPanel columns, depth keys
  uint32_t* q;       // a tile of A
  uint32_t* p;       // a tile of A, depth places
  float* scores;     // [kTileRows, places]: packed keys and the others, both padded
  // Of each query: its highest score so far, the sum of its weights and that of the values by them,
  // both relative to the highest; the last of one tile where all keys are met at once.
  float* tops;
  float* sums;
  float* out;  // [queries or kTileRows, padded head_dim]
  int64_t places;
  int64_t used;
};

// Keys [begin, begin + count) of a block, which are met together.
struct KeyRange {
  int64_t begin;
  int64_t count;
};

template <class Arch>
inline int64_t key_ranges(const AttentionBlock& block) {
  return max_of(1, ceil_div(block.vision_keys + block.text_keys, kKeysAtOnce<Arch>));
}

template <class Arch>
inline KeyRange key_range(const AttentionBlock& block, int64_t i) {
  const int64_t keys = block.vision_keys + block.text_keys;
  const int64_t panels = ceil_div(keys, kPanel), ranges = key_ranges<Arch>(block);
  const int64_t begin = panels * i / ranges * kPanel;
  return {begin, min_of(keys, panels * (i + 1) / ranges * kPanel) - begin};
}

// Places of the packed keys in a row of scores: whole panels, which are whole chunks of A.
inline int64_t places_in_front(const AttentionBlock& block) {
  return ceil_div(block.packed_count, kPanel) * kPanel;
}

template <class Arch>
inline AttentionScratch carve_attention(const AttentionBlock& block, void* base) {
  Carver carver(base);
  const int64_t panels = ceil_div(block.vision_keys + block.text_keys, kPanel);
  const int64_t ranges = key_ranges<Arch>(block);
  const int64_t keys = ceil_div(panels, ranges) * kPanel;
  const int64_t places = places_in_front(block) + keys;
  const int64_t columns = ceil_div(block.head_dim, kPanel) * kPanel;
  const int64_t units = chunks_of<Arch>(block.head_dim) * kChunk;
  const int64_t queries = block.end - block.begin;
  AttentionScratch s;
  s.places = places;
  s.keys = carver.take<uint32_t>(keys * units);
  s.values = carver.take<uint32_t>(chunks_of<Arch>(keys) * kChunk * columns);
  s.q = carver.take<uint32_t>(Arch::kTileRows * chunks_of<Arch>(block.head_dim) * Arch::kRowWords);
  s.p = carver.take<uint32_t>(Arch::kTileRows * chunks_of<Arch>(places) * Arch::kRowWords);
  s.scores = carver.take<float>(Arch::kTileRows * places);
  s.tops = carver.take<float>(queries);
  s.sums = carver.take<float>(queries);
  s.out = carver.take<float>((ranges > 1 ? queries : Arch::kTileRows) * columns);
  s.used = carver.used();
  return s;
}

template <class Arch>
int64_t attention_scratch(const AttentionBlock& block) {
  return carve_attention<Arch>(block, nullptr).used;
}

inline int64_t key_row(const AttentionBlock& block, int64_t key) {
  return key < block.vision_keys ? block.key_vision_row + key
                                 : block.key_text_row + key - block.vision_keys;
}

// Panels of B whose columns are `count` rows, row(i); `foresee(i)` asks memory for what is wanted
// soon.
template <class Arch, class Row, class Foresee>
inline void pack_as_columns(const Row& row, int64_t count, int64_t depth, uint32_t* panels,
                            const Foresee& foresee) {
  const int64_t words = chunks_of<Arch>(depth) * kChunk * kPanel;
  for (int64_t i = 0; i < count; i += kPanel, panels += words) {
    const typename Arch::T* own[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) {
      own[j] = i + j < count ? row(i + j) : nullptr;
      foresee(i + j);
    }
    v_pack_panel(own, min_of(kPanel, count - i), depth, panels);
  }
}

// Panels of B whose depth runs over `count` rows of so many columns, to the end of the last chunk:
// products may read whole chunks. A panel has room for `units`.
template <class Arch, class Row>
inline void pack_as_depth(const Row& row, int64_t count, int64_t columns, int64_t units,
                          uint32_t* panels) {
  const auto at = [&](int64_t i) { return i < count ? row(i) : nullptr; };
  const int64_t filled = chunks_of<Arch>(count) * kChunk;
  for (int64_t unit = 0; unit < filled; ++unit) {
    const auto* const a = at(unit * Arch::kPerUnit);
    const auto* const b = at(unit * Arch::kPerUnit + 1);
    for (int64_t from = 0; from < columns; from += kPanel) {
      v_pack_rows(a, b, from, columns, panels + from * units + unit * kPanel);
    }
  }
}

template <class Arch>
inline void pack_keys_values(const AttentionBlock& block, KeyRange range,
                             const AttentionScratch& s) {
  using T = typename Arch::T;
  const int64_t keys = range.count;
  const auto k = [&](int64_t key) {
    return static_cast<const T*>(block.k) + key_row(block, range.begin + key) * block.k_stride;
  };
  const auto v = [&](int64_t key) {
    return static_cast<const T*>(block.v) + key_row(block, range.begin + key) * block.v_stride;
  };
  pack_as_columns<Arch>(k, keys, block.head_dim, s.keys, [&](int64_t key) {
    if (key + kPanel < keys) foresee_row(k(key + kPanel), block.head_dim);
    if (key < keys) foresee_row(v(key), block.head_dim);
  });
  const int64_t padded = ceil_div(keys, kPanel) * kPanel;
  pack_as_depth<Arch>(v, keys, block.head_dim, chunks_of<Arch>(padded) * kChunk, s.values);
}

// Scores of the packed keys, scaled like the others; those of the padding behind them are -inf.
template <class Arch>
inline void score_packed(const AttentionBlock& block, typename Arch::State& state, int64_t rows,
                         const AttentionScratch& s) {
  const int64_t panel = chunks_of<Arch>(block.head_dim) * kChunk * kPanel;
  multiply<Arch>(state, rows, s.q, block.packed_keys, block.packed_count, panel,
                 ceil_div(block.head_dim, Arch::kPerUnit), s.scores, s.places);
  const int64_t front = places_in_front(block);
  for (int64_t r = 0; r < rows; ++r) {
    float* const scores = s.scores + r * s.places;
    for (int64_t key = 0; key < block.packed_count; ++key) scores[key] *= block.scale;
    for (int64_t key = block.packed_count; key < front; ++key) scores[key] = -__builtin_inff();
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

// weight_of(scores) of the first `visible` scores of a row as a row of A; the rest of `keys` is
// zero, to the end of its last chunk. Returns the sum of the rounded weights.
template <class Arch, class WeightOf>
inline float put_weights(const WeightOf& weight_of, const float* scores, int64_t visible,
                         int64_t keys, uint32_t* a, int64_t chunk_words) {
  const int64_t step = kChunk * Arch::kPerUnit;
  Vec sum = v_zero();
  Vec part[Arch::kPerUnit] = {};
  int64_t i = 0;
  for (; i + step <= visible; i += step, a += chunk_words) {
    for (int j = 0; j < Arch::kPerUnit; ++j) {
      part[j] = weight_of(v_load(scores + i + 16 * j));
    }
    sum = Arch::put_sum(a, part, sum);
  }
  for (; i < keys; i += step, a += chunk_words) {
    for (int j = 0; j < Arch::kPerUnit; ++j) {
      const int64_t left = visible - i - 16 * j;
      part[j] = v_zero();
      if (left <= 0) continue;
      part[j] = weight_of(v_load(scores + i + 16 * j));
      if (left < 16) part[j] = v_keep(part[j], left, 0.0f);
    }
    sum = Arch::put_sum(a, part, sum);
  }
  return v_sum(sum);
}

// The same with weights 2^((score - top) * factor).
template <class Arch>
inline float soften(const float* scores, int64_t visible, int64_t keys, float top, float factor,
                    uint32_t* a, int64_t chunk_words) {
  const float shift = -top * factor;
  const Vec highest = v_set(top), slope = v_set(factor), shifts = v_set(shift);
  // An operation less: the rounding of the shift is at most 2^-12 in the exponent, which bf16 does
  // not show. Larger shifts may round to weights of infinity, or of zero alone.
  if (Arch::kExpDegree == 4 && __builtin_fabsf(shift) < 4096.0f) {
    const auto weight_of = [&](Vec score) { return v_exp2<4>(v_fma(score, slope, shifts)); };
    return put_weights<Arch>(weight_of, scores, visible, keys, a, chunk_words);
  }
  const auto weight_of = [&](Vec score) {
    return v_exp2<Arch::kExpDegree>(v_mul(v_sub(score, highest), slope));
  };
  return put_weights<Arch>(weight_of, scores, visible, keys, a, chunk_words);
}

inline Norm no_norm(int64_t) { return {}; }

inline int64_t query_row(const AttentionBlock& block, int64_t query) {
  return query < block.vision_queries ? block.query_vision_row + query
                                      : block.query_text_row + query - block.vision_queries;
}

// The place of a query among the keys of its segment.
inline int64_t position_of(const AttentionBlock& block, int64_t query, int64_t row) {
  if (block.positions != nullptr) return block.positions[row];
  return query < block.vision_queries ? query : query - block.vision_queries;
}

// How many of a sample's keys (vision first) the mask lets a query see: always a prefix of them.
inline int64_t visible_keys(const AttentionBlock& block, int64_t query, int64_t row) {
  const bool text = query >= block.vision_queries;
  const int64_t position = position_of(block, query, row);
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

// Scales the scores of keys that are seen and makes the others -inf, which no scale of zero may
// meet; whether there are any.
inline bool hide(float* scores, const unsigned char* seen, int64_t keys, float scale) {
  unsigned char any = 0;
  for (int64_t key = 0; key < keys; ++key) {
    any |= seen[key];
    scores[key] = seen[key] != 0 ? scores[key] * scale : -__builtin_inff();
  }
  return any != 0;
}

// The same for a range of the keys of a query.
inline bool hide_unseen(const AttentionBlock& block, int64_t query, int64_t row, KeyRange range,
                        float* scores) {
  const int64_t first = query < block.vision_queries ? 0 : block.seen_text;
  const unsigned char* const seen =
      block.seen + (first + position_of(block, query, row)) * block.seen_stride;
  const int64_t vision = min_of(max_of(block.vision_keys - range.begin, 0), range.count);
  const int64_t text = block.seen_text + max_of(range.begin - block.vision_keys, 0);
  const bool any = hide(scores, seen + range.begin, vision, block.scale);
  return hide(scores + vision, seen + text, range.count - vision, block.scale) || any;
}

// What a query has met so far, relative to a top that its next scores may raise.
template <class Arch>
inline void raise_top(float next, float factor, int64_t columns, float& top, float& sum,
                      float* out) {
  const float before = top;
  top = next > top ? next : top;
  if (sum == 0.0f) {  // nothing yet, whatever hidden values have left
    for (int64_t j = 0; j < columns; j += 16) v_store(out + j, v_zero());
  } else if (top != before) {
    const Vec share = v_exp2<Arch::kExpDegree>(v_set((before - top) * factor));
    for (int64_t j = 0; j < columns; j += 16) v_store(out + j, v_mul(v_load(out + j), share));
    sum *= v_top(share);  // all the same
  }
}

// The queries of a block against a range of its keys; behind the last range their results are
// stored.
template <class Arch>
inline void attend(const AttentionBlock& block, typename Arch::State& state, KeyRange range,
                   bool is_first, bool is_last, const AttentionScratch& s) {
  using T = typename Arch::T;
  const int64_t keys = ceil_div(range.count, kPanel) * kPanel;
  const int64_t front = is_first ? places_in_front(block) : 0;
  const int64_t depth_units = ceil_div(block.head_dim, Arch::kPerUnit);
  const int64_t key_panel_words = chunks_of<Arch>(block.head_dim) * kChunk * kPanel;
  const int64_t value_panel_words = chunks_of<Arch>(keys) * kChunk * kPanel;
  const int64_t columns = ceil_div(block.head_dim, kPanel) * kPanel;
  const float factor = (block.seen != nullptr ? 1.0f : block.scale) * 1.44269504088896341f;

  const int64_t queries = block.end - block.begin;
  const int64_t tiles = ceil_div(queries, Arch::kTileRows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = tile_begin<Arch>(queries, tiles, t);
    const int64_t rows = tile_begin<Arch>(queries, tiles, t + 1) - first;
    const int64_t begin = block.begin + first;
    const int64_t chunk_words = rows * Arch::kRowWords;
    float* const tops = s.tops + first;
    float* const sums = s.sums + first;
    float* const met = s.out + (is_first && is_last ? 0 : first * columns);
    int64_t at[Arch::kTileRows];
    int64_t visible[Arch::kTileRows];
    int64_t most = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t query = begin + r;
      at[r] = query_row(block, query);
      const int64_t own = visible_keys(block, query, at[r]) - range.begin;
      visible[r] = max_of(min_of(own, range.count), 0);
      most = max_of(most, visible[r]);
      if (is_first) {
        tops[r] = -__builtin_inff();
        sums[r] = 0.0f;
      }
    }
    if (front + most > 0) {
      const auto row = [&](int64_t r) {
        return static_cast<const T*>(block.q) + at[r] * block.q_stride;
      };
      pack_tile<Arch>(row, rows, block.head_dim, nullptr, nullptr, no_norm, s.q);
      for (int64_t r = 0; r < rows && begin + rows + r < block.end; ++r) {
        const int64_t query = begin + rows + r;
        foresee_row(static_cast<const T*>(block.q) + query_row(block, query) * block.q_stride,
                    block.head_dim);
      }
      multiply<Arch>(state, rows, s.q, s.keys, most, key_panel_words, depth_units, s.scores + front,
                     s.places);
      if (front > 0) score_packed<Arch>(block, state, rows, s);
      for (int64_t r = 0; r < rows; ++r) {
        float* const scores = s.scores + r * s.places;
        if (block.seen != nullptr &&
            !hide_unseen(block, begin + r, at[r], {range.begin, visible[r]}, scores + front)) {
          visible[r] = 0;
        }
        visible[r] += front;
        raise_top<Arch>(largest(scores, visible[r]), factor, columns, tops[r], sums[r],
                        met + r * columns);
      }
      for (int64_t r = 0; r < rows; ++r) {
        sums[r] += soften<Arch>(s.scores + r * s.places, visible[r], front + most, tops[r], factor,
                                s.p + r * Arch::kRowWords, chunk_words);
      }
      if (front > 0) {
        multiply<Arch>(state, rows, s.p, block.packed_values, block.head_dim,
                       chunks_of<Arch>(block.packed_count) * kChunk * kPanel,
                       ceil_div(block.packed_count, Arch::kPerUnit), met, columns);
      }
      if (most > 0) {
        multiply<Arch>(state, rows, s.p + chunks_of<Arch>(front) * chunk_words, s.values,
                       block.head_dim, value_panel_words, ceil_div(most, Arch::kPerUnit), met,
                       columns, front > 0 || !is_first);
      }
    }
    if (!is_last) continue;
    for (int64_t r = 0; r < rows; ++r) {
      T* const out = static_cast<T*>(block.out) + at[r] * block.out_stride;
      const Vec share = v_set(sums[r] != 0.0f ? 1.0f / sums[r] : 0.0f);
      for (int64_t j = 0; j < block.head_dim; j += 16) {
        // Nothing visible is zero, also where an invisible value is not finite.
        const Vec y = sums[r] != 0.0f ? v_mul(v_load(met + r * columns + j), share) : v_zero();
        store_some(out + j, y, block.head_dim - j);
      }
    }
  }
}

template <class Arch>
void attention_block(const AttentionBlock& block, void* scratch) {
  const AttentionScratch s = carve_attention<Arch>(block, scratch);
  const int64_t ranges = key_ranges<Arch>(block);
  typename Arch::State state;
  for (int64_t i = 0; i < ranges; ++i) {
    const KeyRange range = key_range<Arch>(block, i);
    pack_keys_values<Arch>(block, range, s);
    attend<Arch>(block, state, range, i == 0, i + 1 == ranges, s);
  }
}

}  // namespace
