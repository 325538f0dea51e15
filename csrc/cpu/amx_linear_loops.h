// The loops of expert_linear over one block on AMX. A pair of tiles of rows and one of columns take
// 64 cycles a chunk, in which little but L1 and L2 can keep up, and other units stand idle:
//   - A slice of A's depth stays in L2 for all panels; sums of the slices before lie in memory.
//   - A block of B stays in L1 for all tiles of rows, which A's loads go past.
//   - While one tile is multiplied, the one before is finished and the next block of B asked for.
#pragma once

#include "amx_tiles.h"
#include "linear_loops.h"

namespace {

// In chunks: of A in L2 and of B in L1. Sums that wait in memory cost more than rows that take a
// little more room: a depth of no more than kWholeSlice is not sliced. They also cost more than
// what of B finds none in L1: one of no more than kSlice is not cut into blocks either.
constexpr int64_t kWholeSlice = 32, kSlice = 24, kBlockOfB = 16;
constexpr int64_t kSliceBytes = int64_t{800} << 10;
// Panels whose sums wait in memory together, where A comes in slices.
constexpr int64_t kGroup = 32;
constexpr int64_t kSumWords = kAmxRows * kPanel;

inline int64_t slices_of(int64_t chunks) {
  return chunks <= kWholeSlice ? 1 : ceil_div(chunks, kSlice);
}

template <class Arch>
int64_t amx_most_rows(int64_t in_features) {
  const int64_t chunks = chunks_of<Arch>(in_features);
  const int64_t row = ceil_div(chunks, slices_of(chunks)) * kCacheLine;
  return min_of(512, kSliceBytes / (row * kAmxRows) * kAmxRows);
}

struct AmxScratch {
  uint32_t* a;  // a slice: tiles of chunks of rows
  Norm* norms;
  float* scales;
  float* inverses;
  float* sums;  // of tiles of a panel, or of all panels of a group
  float* done;  // two tiles: one is finished while the other is multiplied
};

template <class Arch>
inline AmxScratch carve_amx(const LinearBlock& block, Carver& carver) {
  const int64_t chunks = chunks_of<Arch>(block.in_features);
  const int64_t slices = slices_of(chunks), tiles = ceil_div(block.count, kAmxRows);
  const int64_t panels = slices == 1 ? 1 : min_of(kGroup, block.panel_end - block.panel_begin);
  AmxScratch out;
  out.a = carver.take<uint32_t>(block.count * ceil_div(chunks, slices) * Arch::kRowWords);
  out.norms = carver.take<Norm>(block.norm_weight == nullptr ? 0 : block.count);
  out.scales = carver.take<float>(Arch::kInt8 ? block.count : 0);
  out.inverses = carver.take<float>(Arch::kInt8 ? block.count : 0);
  out.sums = carver.take<float>(panels * tiles * kSumWords);
  out.done = carver.take<float>(2 * kSumWords);
  return out;
}

template <class Arch>
int64_t amx_linear_scratch(const LinearBlock& block) {
  Carver carver(nullptr);
  carve_amx<Arch>(block, carver);
  return carver.used();
}

// What happens beside the products of a tile, a share of it with each chunk of their depth.
template <class Arch>
class Meanwhile {
 public:
  explicit Meanwhile(const LinearBlock& block) : block_(block), finish_(finish_of<Arch>(block)) {}

  // Lines of B to ask for, so many with each of `steps` chunks.
  void ask_for(const uint32_t* b, int64_t words, int64_t steps) {
    next_b_ = reinterpret_cast<const char*>(b);
    b_lines_ = b == nullptr ? 0 : words * 4 / kCacheLine;
    b_share_ = ceil_div(b_lines_, steps);
  }

  // The chunks of the tile that comes now; `sums` are those that the one after it adds to.
  void begin_tile(int64_t chunks, const float* sums) {
    row_share_ = ceil_div(rows_left_, chunks);
    sums_ = reinterpret_cast<const char*>(sums);
    sum_lines_ = sums == nullptr ? 0 : kSumWords * 4 / kCacheLine;
    sum_share_ = ceil_div(sum_lines_, chunks);
  }

  void chunk() {
    for (int64_t i = min_of(b_share_, b_lines_); i > 0; --i, --b_lines_, next_b_ += kCacheLine) {
      __builtin_prefetch(next_b_, 0, 2);
    }
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
  void hand_over(int64_t first, int64_t rows, int64_t column, int64_t columns, const float* c,
                 const Scales& scales) {
    foresee<Arch>(block_, first, rows, column, columns);
    first_ = first;
    rows_left_ = rows;
    column_ = column;
    columns_ = columns;
    c_ = c;
    scales_ = scales;
  }

 private:
  void finish_rows(int64_t rows) {
    finish_(block_, first_, rows, column_, columns_, c_, kPanel, scales_);
    first_ += rows;
    rows_left_ -= rows;
    c_ += rows * kPanel;
    if (Arch::kInt8) scales_.rows += rows;
  }

  const LinearBlock& block_;
  const Finish finish_;
  const char* next_b_ = nullptr;
  int64_t b_lines_ = 0, b_share_ = 0;
  const char* sums_ = nullptr;
  int64_t sum_lines_ = 0, sum_share_ = 0;
  int64_t first_ = 0, rows_left_ = 0, row_share_ = 0, column_ = 0, columns_ = 0;
  const float* c_ = nullptr;
  Scales scales_{};
};

template <class Arch>
void amx_linear_block(const LinearBlock& block, void* scratch) {
  using T = typename Arch::T;
  Carver carver(scratch);
  const AmxScratch own = carve_amx<Arch>(block, carver);
  const int64_t chunks = chunks_of<Arch>(block.in_features), slices = slices_of(chunks);
  const int64_t panel_words = chunks * kChunk * kPanel;
  const int64_t tiles = ceil_div(block.count, kAmxRows);
  const auto row = [&](int64_t r) {
    return StripRow<T>{
        static_cast<const T*>(block.x) + row_of(block, block.first + r) * block.x_stride,
        block.x_strip};
  };

  for (int64_t r = 0; r < block.count; ++r) {
    Norm norm{};
    if (block.norm_weight != nullptr) {
      norm = own.norms[r] = measure<Arch>(row(r), block.in_features, block.eps);
    }
    if constexpr (Arch::kInt8) {
      const Rounding rounding =
          measure_rounding(row(r), block.in_features, norm, block.norm_weight, block.norm_bias);
      own.scales[r] = rounding.scale;
      own.inverses[r] = rounding.inverse;
    }
  }
  const auto pack_slice = [&](int64_t from, int64_t to) {
    for (int64_t r = 0; r < block.count; ++r) {
      const int64_t begin = r / kAmxRows * kAmxRows;
      const int64_t rows = min_of(kAmxRows, block.count - begin);
      uint32_t* const a = own.a + (begin * (to - from) + r - begin) * Arch::kRowWords;
      const Norm norm = block.norm_weight == nullptr ? Norm{} : own.norms[r];
      if constexpr (Arch::kInt8) {
        put_int8_row<Arch>(row(r), block.in_features, from, to, norm, block.norm_weight,
                           block.norm_bias, own.inverses[r], a, rows * Arch::kRowWords);
      } else {
        put_row<Arch>(row(r), block.in_features, from, to, norm, block.norm_weight, block.norm_bias,
                      a, rows * Arch::kRowWords);
      }
    }
  };

  Meanwhile<Arch> meanwhile(block);
  const auto panel_at = [&](int64_t panel) {
    return block.parts[panel / block.part_panels] + panel % block.part_panels * panel_words;
  };
  Tiles state;
  int64_t turn = 0;
  for (int64_t group = block.panel_begin; group < block.panel_end;) {
    const int64_t group_end =
        slices == 1 ? block.panel_end : min_of(block.panel_end, group + kGroup);
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t slice_begin = chunks * slice / slices;
      const int64_t slice_end = chunks * (slice + 1) / slices;
      pack_slice(slice_begin, slice_end);
      const int64_t depths = chunks <= kSlice ? 1 : ceil_div(slice_end - slice_begin, kBlockOfB);
      const auto depth_at = [&](int64_t d) {
        return slice_begin + (slice_end - slice_begin) * d / depths;
      };
      for (int64_t panel = group; panel < group_end; ++panel) {
        Scales scales = scales_of(block, panel * kPanel, panel_words, own.scales);
        const int64_t column = panel * kPanel;
        const int64_t columns = min_of(kPanel, block.out_features - column);
        float* const sums = own.sums + (slices == 1 ? 0 : (panel - group) * tiles * kSumWords);
        for (int64_t d = 0; d < depths; ++d) {
          const int64_t from = depth_at(d), to = depth_at(d + 1);
          const uint32_t* const b = panel_at(panel) + from * kChunk * kPanel;
          const bool first = from == 0, last = to == chunks;
          const uint32_t* next = nullptr;  // the block of B that comes next
          if (d + 1 < depths) {
            next = panel_at(panel) + to * kChunk * kPanel;
          } else if (panel + 1 < group_end) {
            next = panel_at(panel + 1) + slice_begin * kChunk * kPanel;
          }
          meanwhile.ask_for(next, (to - from) * kChunk * kPanel, tiles * (to - from));
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t begin = t * kAmxRows, rows = min_of(kAmxRows, block.count - begin);
            const uint32_t* const a =
                own.a +
                (begin * (slice_end - slice_begin) + (from - slice_begin) * rows) * Arch::kRowWords;
            float* const kept = sums + t * kSumWords;
            float* const result = last ? own.done + (turn++ % 2) * kSumWords : kept;
            const bool far_sums = slices > 1 && !first && t + 1 < tiles;
            meanwhile.begin_tile(to - from, far_sums ? kept + kSumWords : nullptr);
            Arch::template multiply<true>(state, rows, ceil_div(columns, 16), a, b, to - from,
                                          kBlockOfB, first ? nullptr : kept, result, kPanel,
                                          [&] { meanwhile.chunk(); });
            if (last) {
              scales.rows = own.scales + begin;
              meanwhile.hand_over(block.first + begin, rows, column, columns, result, scales);
            }
          }
        }
      }
    }
    group = group_end;
  }
  meanwhile.finish_all();
}

struct AmxLinear {
  template <class Arch>
  static constexpr LinearKernels of() {
    return {amx_most_rows<Arch>, kAmxRows, true, amx_linear_scratch<Arch>, amx_linear_block<Arch>};
  }
};

}  // namespace
