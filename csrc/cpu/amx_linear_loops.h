// The loops of expert_linear over one block on AMX. A pair of tiles of rows and one of columns take
// 64 cycles a chunk (of fp32, six products, 384), in which little but L1 and L2 can keep up, and
// other units stand idle:
//   - A slice of A's depth stays in L2 for all panels; sums of the slices before lie in memory.
//   - A block of B stays in L1 for all tiles of rows, which A's loads go past.
//   - While one tile is multiplied, the one before is finished and the next block of B asked for,
//     or made, where it is converted (Arch::kConverts).
#pragma once

#include "amx_tiles.h"
#include "linear_loops.h"

namespace {

// Panels whose sums wait in memory together, where A comes in slices.
constexpr int64_t kGroup = 32;
// How far ahead of what is converted memory is asked for, in words, and the share of a step up to
// which products hide the way from there: that of three tiles of rows.
constexpr int64_t kAskedWords = 2048, kShareOfTiles = 2;
constexpr int64_t kSumWords = kAmxRows * kPanel, kLineWords = kCacheLine / 4;

template <class Arch>
inline int64_t slices_of(int64_t chunks) {
  return chunks <= Arch::kWholeSlice ? 1 : ceil_div(chunks, Arch::kSlice);
}

template <class Arch>
int64_t amx_most_rows(int64_t in_features) {
  const int64_t chunks = chunks_of<Arch>(in_features);
  const int64_t row = ceil_div(chunks, slices_of<Arch>(chunks)) * Arch::kRowWords * 4;
  return min_of(Arch::kMostRows, Arch::kSliceBytes / (row * kAmxRows) * kAmxRows);
}

struct AmxScratch {
  uint32_t* a;  // a slice: tiles of chunks of rows
  Norm* norms;
  float* scales;
  float* inverses;
  float* row_sums;  // for the statistics that the block leaves
  float* sums;      // of tiles of a panel, or of all panels of a group
  float* done;      // a tile, finished while the next is multiplied, before that is stored
  uint32_t* b[2];   // converted blocks of B: one is made while the other is multiplied
};

template <class Arch>
inline AmxScratch carve_amx(const LinearBlock& block, Carver& carver) {
  const int64_t chunks = chunks_of<Arch>(block.in_features);
  const int64_t slices = slices_of<Arch>(chunks), tiles = ceil_div(block.count, kAmxRows);
  const int64_t panels = slices == 1 ? 1 : min_of(kGroup, block.panel_end - block.panel_begin);
  AmxScratch out;
  out.a = carver.take<uint32_t>(block.count * ceil_div(chunks, slices) * Arch::kRowWords);
  out.norms = carver.take<Norm>(block.norm_weight == nullptr ? 0 : block.count);
  out.scales = carver.take<float>(Arch::kInt8 ? block.count : 0);
  out.inverses = carver.take<float>(Arch::kInt8 ? block.count : 0);
  out.row_sums = take_row_sums<Arch>(block, carver);
  out.sums = carver.take<float>(panels * tiles * kSumWords);
  out.done = carver.take<float>(kSumWords);
  for (uint32_t*& b : out.b) {
    b = carver.take<uint32_t>(Arch::kConverts ? Arch::kBlockOfB * Arch::kChunkWords : 0);
  }
  return out;
}

template <class Arch>
int64_t amx_linear_scratch(const LinearBlock& block) {
  Carver carver(nullptr);
  carve_amx<Arch>(block, carver);
  return carver.used();
}

// What is multiplied in a chunk of A, in units of B, and the units of a whole panel.
template <class Arch>
constexpr int64_t kChunkUnits = kChunk * Arch::kPerUnit / Arch::kPerPackedUnit;
template <class Arch>
inline int64_t panel_units(const LinearBlock& block) {
  return ceil_div(block.in_features, kChunk * Arch::kPerPackedUnit) * kChunk;
}

template <class Arch>
inline const uint32_t* panel_of(const LinearBlock& block, int64_t panel) {
  return block.parts[panel / block.part_panels] +
         panel % block.part_panels * panel_units<Arch>(block) * kPanel;
}

// Lines of memory that are asked for, in several streams in turn: at the beginning of every 4 KB
// page the hardware's prefetching begins anew, and a stream waits.
class Lines {
 public:
  Lines() = default;
  Lines(const uint32_t* begin, int64_t count)
      : begin_(begin), count_(count), each_(ceil_div(count, kStreams)) {}

  void ask(int64_t count) {
    for (; count > 0; --count) {
      const int64_t line = stream_ * each_ + at_;
      if (line < count_) __builtin_prefetch(begin_ + line * kLineWords, 0, 2);
      if (++stream_ == kStreams) {
        stream_ = 0;
        ++at_;
      }
    }
  }

  // What ask() wants in all.
  int64_t count() const { return each_ * kStreams; }

 private:
  static constexpr int64_t kStreams = 8;
  const uint32_t* begin_ = nullptr;
  int64_t count_ = 0, each_ = 0, stream_ = 0, at_ = 0;
};

// A block of B: chunks of A [from, to) of a panel, as the part `depth` of a slice.
struct BlockOfB {
  int64_t group;
  int64_t slice;
  int64_t panel;
  int64_t depth;
  int64_t from;
  int64_t to;
};

// The blocks of B as they are multiplied: by groups of panels, in each by slices, in each by
// panels.
template <class Arch>
class BlocksOfB {
 public:
  explicit BlocksOfB(const LinearBlock& block) : end_(block.panel_end) {
    chunks_ = chunks_of<Arch>(block.in_features);
    slices_ = slices_of<Arch>(chunks_);
  }

  int64_t slices() const { return slices_; }
  int64_t slice_begin(int64_t slice) const { return chunks_ * slice / slices_; }
  bool has(const BlockOfB& b) const { return b.panel < end_; }
  static bool opens_slice(const BlockOfB& b) { return b.panel == b.group && b.depth == 0; }

  BlockOfB at(int64_t group, int64_t slice, int64_t panel, int64_t depth) const {
    return {group, slice, panel, depth, edge(slice, depth), edge(slice, depth + 1)};
  }

  BlockOfB after(const BlockOfB& b) const {
    const int64_t group_end = slices_ == 1 ? end_ : min_of(end_, b.group + kGroup);
    if (b.depth + 1 < depths(b.slice)) return at(b.group, b.slice, b.panel, b.depth + 1);
    if (b.panel + 1 < group_end) return at(b.group, b.slice, b.panel + 1, 0);
    if (b.slice + 1 < slices_) return at(b.group, b.slice + 1, b.group, 0);
    return at(group_end, 0, group_end, 0);
  }

 private:
  int64_t depths(int64_t slice) const {
    const int64_t chunks = slice_begin(slice + 1) - slice_begin(slice);
    return chunks_ <= Arch::kUncut ? 1 : ceil_div(chunks, Arch::kBlockOfB);
  }
  int64_t edge(int64_t slice, int64_t depth) const {
    const int64_t begin = slice_begin(slice);
    return begin + (slice_begin(slice + 1) - begin) * depth / depths(slice);
  }

  int64_t end_;
  int64_t chunks_;
  int64_t slices_;
};

// What happens beside the products of a tile, a share of it with each step of them. The compiler
// knows what a block ends with: the branches cost the first product of a layer's network 2%.
template <class Arch, bool kGelu, bool kResidual, bool kStatistics>
class Meanwhile {
  using T = typename Arch::T;
  using Sums = typename Arch::Sums;

 public:
  Meanwhile(const LinearBlock& block, float* row_sums)
      : block_(block), row_sums_(row_sums), finish_(finish_of<Arch>(block)) {}

  // Chunks [from, to) of a panel of B, which come next, asked for or made in `made` during `steps`
  // steps.
  void prepare(const uint32_t* panel, int64_t from, int64_t to, uint32_t* made, int64_t steps) {
    const int64_t begin = from * kChunkUnits<Arch>, units = (to - from) * kChunkUnits<Arch>;
    if constexpr (Arch::kConverts) {
      next_b_ = panel + begin * kPanel;
      to_ = made;
      made_ = 0;
      there_ = min_of(begin + units, panel_units<Arch>(block_)) - begin;
      b_left_ = units;
    } else {
      lines_ = Lines(panel + begin * kPanel, units * kPanel / kLineWords);
      b_left_ = lines_.count();
    }
    b_share_ = ceil_div(b_left_, steps);
    from_memory_ = b_share_ > kShareOfTiles;
  }

  // A share of that, or all that is left of it.
  void prepare_step() { prepare_some(min_of(b_share_, b_left_)); }
  void prepare_rest() { prepare_some(b_left_); }

  // The chunks of the tile that comes now; `sums` are those that the one after it adds to.
  void begin_tile(int64_t chunks, const float* sums) {
    const int64_t steps = chunks * Arch::kSteps;
    row_share_ = ceil_div(rows_left_, steps);
    sums_ = reinterpret_cast<const char*>(sums);
    sum_lines_ = sums == nullptr ? 0 : kSumWords * 4 / kCacheLine;
    sum_share_ = ceil_div(sum_lines_, steps);
  }

  void step() {
    prepare_step();
    for (int64_t i = min_of(sum_share_, sum_lines_); i > 0; --i, --sum_lines_) {
      __builtin_prefetch(sums_, 0, 3);
      sums_ += kCacheLine;
    }
    if (rows_left_ > 0) finish_rows(min_of(row_share_, rows_left_));
  }

  void finish_all() {
    if (rows_left_ > 0) finish_rows(rows_left_);
  }

  // The tile of sums `c` is complete. Whatever was left of the one before is done by now.
  void hand_over(int64_t first, int64_t rows, int64_t column, int64_t columns, float* c,
                 const Scales& scales) {
    plain_ = can_be_plain_ && columns == kPanel;
    if (plain_) {
      if (kStatistics) words_ = row_sums_ + (first - block_.first) * Sums::kWords;
      out_ = static_cast<T*>(block_.out) + first * block_.out_stride +
             place_of(column, block_.out_strip);
      if (kResidual) {
        residual_ = static_cast<const T*>(block_.residual) + first * block_.residual_stride +
                    place_of(column, block_.residual_strip);
      }
    } else {
      foresee<Arch>(block_, first, rows, column, columns);
    }
    first_ = first;
    rows_left_ = rows;
    column_ = column;
    columns_ = columns;
    c_ = c;
    scales_ = scales;
  }

 private:
  void prepare_some(int64_t count) {
    b_left_ -= count;
    if constexpr (Arch::kConverts) {
      for (; count > 0; --count, ++made_) {
        // Half of a pair of units at a time. Behind the panel follow zeros, as behind the rows.
        const int64_t pair = made_ / 2, column = made_ % 2 * 16;
        if (from_memory_) {
          // Few products hide little of the way from memory.
          const uint32_t* const ahead = next_b_ + kAskedWords + 2 * (pair * kPanel + column);
          for (int64_t i = 0; i < 2; ++i) __builtin_prefetch(ahead + i * kLineWords, 0, 2);
        }
        Arch::convert(made_ < there_ ? next_b_ + 2 * pair * kPanel + column : nullptr,
                      to_ + pair / kChunk * Arch::kChunkWords + pair % kChunk * kPanel + column);
      }
    } else {
      lines_.ask(count);
    }
  }

  void finish_rows(int64_t rows) {
    if constexpr (Arch::kConverts) {
      for (int64_t r = 0; r < rows; ++r) {
        float* const c = c_ + r * kPanel;
        // The right half of a panel without columns there is not written.
        if (spoilt(c) != 0 || (columns_ > 16 && spoilt(c + 16) != 0)) sum_plainly(first_ + r, c);
      }
    }
    if (plain_) {
      finish_plain(rows);
    } else {
      finish_(block_, first_, rows, column_, columns_, c_, kPanel, scales_, row_sums_);
    }
    first_ += rows;
    rows_left_ -= rows;
    c_ += rows * kPanel;
    if (Arch::kInt8) scales_.rows += rows;
  }

  // What finish_() does with whole panels of rows one behind the other, inlined: for a row or two
  // the call costs more than the work. Loads of tiles seem to wait until it is known where earlier
  // stores go, so places are at hand and not computed from rows and columns (1.06).
  void finish_plain(int64_t rows) {
    const float* c = c_;
    T* out = out_;
    const T* residual = residual_;
    float* words = words_;
    const Vec bias[] = {v_load(block_.bias + column_), v_load(block_.bias + column_ + 16)};
    for (int64_t r = 0; r < rows; ++r, c += kPanel, out += block_.out_stride) {
      Vec y[2];
      for (int64_t j = 0; j < 2; ++j) {
        y[j] = activated<Arch>(c, r, 16 * j, scales_, bias[j], kGelu);
        if (kResidual) y[j] = v_add(y[j], v_load(residual + 16 * j));
        if (!kStatistics) v_store(out + 16 * j, y[j]);
      }
      if (kStatistics) {
        Sums sums;
        sums.load(words);
        sums.put(out, y, column_);
        sums.store(words);
        words += Sums::kWords;
      }
      if (kResidual) residual += block_.residual_stride;
    }
    out_ = out;
    residual_ = residual;
    if (kStatistics) words_ = words;
  }

  // Which of sixteen sums are infinite or not a number.
  static __mmask16 spoilt(const float* c) {
    const Vec poison = v_mul(v_load(c), v_zero());
    return _mm512_cmp_ps_mask(poison, poison, _CMP_UNORD_Q);
  }

  static bool holds_nan(const StripRow<T>& row, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
      const Vec x = load_some(at(row, i), n - i);
      if (_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0) return true;
    }
    return false;
  }

  // Those of the sums of one row and this panel that are not finite, once more without parts: what
  // is infinite has none, nor has what is nearly so.
  void sum_plainly(int64_t sorted, float* c) const {
    const int64_t depth = block_.in_features;
    const auto* b = reinterpret_cast<const float*>(panel_of<Arch>(block_, column_ / kPanel));
    const StripRow<T> row{
        static_cast<const T*>(block_.x) + row_of(block_, sorted) * block_.x_stride, block_.x_strip};
    if (holds_nan(row, depth)) return;
    Norm norm{};
    if (block_.norm_weight != nullptr) norm = norm_of_row<Arch>(block_, sorted, row);
    Vec sum[2] = {v_zero(), v_zero()};
    for (int64_t from = 0; from < depth; from += 16) {
      float values[16];
      v_store(values, normal_values(at(row, from), from, depth, norm, block_.norm_weight,
                                    block_.norm_bias));
      for (int64_t k = 0; k < min_of(16, depth - from); ++k, b += kPanel) {
        for (int j = 0; j < 2; ++j) sum[j] = v_fma(v_set(values[k]), v_load(b + 16 * j), sum[j]);
      }
    }
    for (int j = 0; j < 2; ++j) _mm512_mask_storeu_ps(c + 16 * j, spoilt(c + 16 * j), sum[j]);
  }

  const LinearBlock& block_;
  float* const row_sums_;
  const Finish finish_;
  Lines lines_;
  const uint32_t* next_b_ = nullptr;
  bool from_memory_ = false;
  int64_t b_left_ = 0, b_share_ = 0;  // lines, or halves of pairs of units to be made
  uint32_t* to_ = nullptr;
  int64_t made_ = 0, there_ = 0;
  const char* sums_ = nullptr;
  int64_t sum_lines_ = 0, sum_share_ = 0;
  int64_t first_ = 0, rows_left_ = 0, row_share_ = 0, column_ = 0, columns_ = 0;
  float* c_ = nullptr;
  Scales scales_{};
  const bool can_be_plain_ =
      block_.rows == nullptr && block_.bare == nullptr && block_.bias != nullptr;
  bool plain_ = false;
  T* out_ = nullptr;
  const T* residual_ = nullptr;
  float* words_ = nullptr;
};

template <class Arch, bool kGelu, bool kResidual, bool kStatistics>
void amx_linear_block(const LinearBlock& block, void* scratch) {
  using T = typename Arch::T;
  Carver carver(scratch);
  const AmxScratch own = carve_amx<Arch>(block, carver);
  const int64_t chunks = chunks_of<Arch>(block.in_features);
  const int64_t panel_words = panel_units<Arch>(block) * kPanel;
  const int64_t tiles = ceil_div(block.count, kAmxRows);
  const auto row = [&](int64_t r) {
    return StripRow<T>{
        static_cast<const T*>(block.x) + row_of(block, block.first + r) * block.x_stride,
        block.x_strip};
  };

  if (block.norm_weight != nullptr) norms_of_rows<Arch>(block, row, own.norms);
  if constexpr (Arch::kInt8) {
    for (int64_t r = 0; r < block.count; ++r) {
      const Norm norm = block.norm_weight == nullptr ? Norm{} : own.norms[r];
      const Rounding rounding =
          measure_rounding(row(r), block.in_features, norm, block.norm_weight, block.norm_bias);
      own.scales[r] = rounding.scale;
      own.inverses[r] = rounding.inverse;
    }
  }
  Meanwhile<Arch, kGelu, kResidual, kStatistics> meanwhile(block, own.row_sums);
  const auto pack_slice = [&](int64_t from, int64_t to) {
    for (int64_t r = 0; r < block.count; ++r) {
      const int64_t begin = r / kAmxRows * kAmxRows;
      const int64_t rows = min_of(kAmxRows, block.count - begin);
      uint32_t* const a = own.a + (begin * (to - from) + r - begin) * Arch::kRowWords;
      const Norm norm = block.norm_weight == nullptr ? Norm{} : own.norms[r];
      meanwhile.prepare_step();
      if constexpr (Arch::kInt8) {
        put_int8_row<Arch>(row(r), block.in_features, from, to, norm, block.norm_weight,
                           block.norm_bias, own.inverses[r], a, rows * Arch::kRowWords);
      } else {
        put_row<Arch>(row(r), block.in_features, from, to, norm, block.norm_weight, block.norm_bias,
                      a, rows * Arch::kRowWords);
      }
    }
    meanwhile.prepare_rest();
  };

  const BlocksOfB<Arch> blocks(block);
  const bool sliced = blocks.slices() > 1;
  Tiles state;
  int64_t turn = 0;  // of the two converted blocks
  const auto prepare = [&](const BlockOfB& b, int64_t steps) {
    if (!blocks.has(b)) return;
    meanwhile.prepare(panel_of<Arch>(block, b.panel), b.from, b.to, own.b[turn % 2], steps);
  };
  BlockOfB b = blocks.at(block.panel_begin, 0, block.panel_begin, 0);
  prepare(b, block.count);
  while (blocks.has(b)) {
    const int64_t slice_begin = blocks.slice_begin(b.slice);
    const int64_t width = blocks.slice_begin(b.slice + 1) - slice_begin;
    if (BlocksOfB<Arch>::opens_slice(b)) pack_slice(slice_begin, slice_begin + width);
    const uint32_t* const own_b =
        Arch::kConverts ? own.b[turn % 2]
                        : panel_of<Arch>(block, b.panel) + b.from * kChunkUnits<Arch> * kPanel;
    ++turn;
    const BlockOfB next = blocks.after(b);
    prepare(next, tiles * (b.to - b.from) * Arch::kSteps);

    const bool first = b.from == 0, last = b.to == chunks;
    const int64_t column = b.panel * kPanel;
    const int64_t columns = min_of(kPanel, block.out_features - column);
    Scales scales = scales_of(block, column, panel_words, own.scales);
    float* const sums = own.sums + (sliced ? (b.panel - b.group) * tiles * kSumWords : 0);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = t * kAmxRows, rows = min_of(kAmxRows, block.count - begin);
      const uint32_t* const a =
          own.a + (begin * width + (b.from - slice_begin) * rows) * Arch::kRowWords;
      float* const kept = sums + t * kSumWords;
      float* const result = last ? own.done : kept;
      const bool far_sums = sliced && !first && t + 1 < tiles;
      meanwhile.begin_tile(b.to - b.from, far_sums ? kept + kSumWords : nullptr);
      const bool next_is_whole = block.count - begin >= 2 * kAmxRows;
      const uint32_t* const next_a = next_is_whole ? a + rows * width * Arch::kRowWords : nullptr;
      Arch::template multiply<true>(state, rows, ceil_div(columns, 16), a, own_b, b.to - b.from,
                                    Arch::kBlockOfB, first ? nullptr : kept, result, kPanel, next_a,
                                    [&] { meanwhile.step(); });
      if (last) {
        scales.rows = own.scales + begin;
        meanwhile.hand_over(block.first + begin, rows, column, columns, result, scales);
      }
    }
    b = next;
  }
  meanwhile.finish_all();
  leave_statistics<Arch>(block, own.row_sums);
}

template <class Arch, bool kGelu, bool kResidual>
void amx_linear_block(const LinearBlock& block, void* scratch) {
  const auto run = block.statistics != nullptr ? amx_linear_block<Arch, kGelu, kResidual, true>
                                               : amx_linear_block<Arch, kGelu, kResidual, false>;
  run(block, scratch);
}

template <class Arch>
void amx_linear_block(const LinearBlock& block, void* scratch) {
  const bool residual = block.residual != nullptr;
  const auto run =
      block.activation == Activation::kGelu
          ? (residual ? amx_linear_block<Arch, true, true> : amx_linear_block<Arch, true, false>)
          : (residual ? amx_linear_block<Arch, false, true> : amx_linear_block<Arch, false, false>);
  run(block, scratch);
}

// product_loop (kernels.h) where B is converted: a block of it at a time, outside the loop.
template <class Arch>
int64_t converted_product_loop(const LinearBlock& block, int64_t repeats, void* scratch) {
  LinearBlock tile = block;
  tile.count = min_of(block.count, kAmxRows);
  Carver carver(scratch);
  const AmxScratch own = carve_amx<Arch>(tile, carver);
  const int64_t columns = min_of(kPanel, block.out_features);
  Meanwhile<Arch, false, false, false> meanwhile(tile, own.row_sums);
  Tiles state;
  for (int64_t from = 0, to = 0; from < chunks_of<Arch>(block.in_features); from = to) {
    to = min_of(from + Arch::kBlockOfB, chunks_of<Arch>(block.in_features));
    for (int64_t r = 0; r < tile.count; ++r) {
      put_row<Arch>(static_cast<const typename Arch::T*>(block.x) + r * block.x_stride,
                    block.in_features, from, to, Norm{}, nullptr, nullptr,
                    own.a + r * Arch::kRowWords, tile.count * Arch::kRowWords);
    }
    meanwhile.prepare(block.parts[0], from, to, own.b[0], 1);
    meanwhile.prepare_rest();
    for (int64_t i = 0; i < repeats; ++i) {
      Arch::template multiply<false>(state, tile.count, ceil_div(columns, 16), own.a, own.b[0],
                                     to - from, to - from, nullptr, own.done, kPanel, nullptr,
                                     [] {});
    }
  }
  return tile.count * ceil_div(columns, 16) * 16;
}

struct AmxLinear {
  template <class Arch>
  static constexpr LinearKernels of() {
    return {amx_most_rows<Arch>, kAmxRows, true, amx_linear_scratch<Arch>, amx_linear_block<Arch>};
  }
};

}  // namespace
