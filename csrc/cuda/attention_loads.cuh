// How exactly the wanted rows of a head come into a tile: boxes of the tensor memory accelerator.
#pragma once

#include "attention_rows.cuh"
#include "hopper.cuh"

namespace beit3_fast::cuda {

// One operand [rows, heads, head_dim], to be read in boxes of 64, 8 or 1 rows of one head's part.
struct RowMaps {
  TensorMap rows64;
  TensorMap rows8;
  TensorMap rows1;
};

struct AttentionMaps {
  RowMaps q;
  RowMaps k;
  RowMaps v;
};

// A warp copies the places [first, first + kSlots) of a head into a tile and returns at once; the
// barrier expects kSlots * kParts rows. Exactly the wanted rows are read, so that nothing of
// another sample, such as a NaN, ever lies in the tile. Slots behind the last place are filled from
// beyond the tensor, which gives zeros.
template <int kParts, int kSlots>
__device__ void load_places(const RowMaps& maps, const Places& places, int num_rows, int head,
                            int first, uint32_t tile, uint32_t barrier) {
  const auto copy = [&](const TensorMap& map, int slot, int row) {
    for (int part = 0; part < kParts; ++part) {
      tma_load_3d(tile + (part * kSlots + slot) * kRowBytes, map, barrier, part * kPartColumns,
                  head, row);
    }
  };
  const auto padding = [&](int place) { return place >= places.count(); };
  const auto row_of = [&](int place) { return padding(place) ? num_rows : places.row(place); };
  const int lane = lane_index();
  for (int slot = 0; slot < kSlots; slot += 64) {
    const int place = first + slot;
    if (slot + 64 <= kSlots && (padding(place) || places.together(place, 64))) {
      if (lane == 0) copy(maps.rows64, slot, row_of(place));
      continue;
    }
    const int own = slot + 8 * lane;
    if (lane >= 8 || own >= kSlots) continue;
    if (padding(first + own) || places.together(first + own, 8)) {
      copy(maps.rows8, own, row_of(first + own));
    } else {
      for (int i = 0; i < 8; ++i) copy(maps.rows1, own + i, row_of(first + own + i));
    }
  }
}

// The barrier's one arrival, and the rows of up to 64 queries on their way.
template <int kParts>
__device__ void load_queries(const RowMaps& map, const SharedAttention& op, const Head& head,
                             int first, uint32_t tile, uint32_t barrier) {
  if (lane_index() == 0) barrier_expect(barrier, kQueries * kParts * kRowBytes);
  sync_warp();
  load_places<kParts, kQueries>(map, head.queries, static_cast<int>(op.num_queries), head.index,
                                first, tile, barrier);
}

}  // namespace beit3_fast::cuda
