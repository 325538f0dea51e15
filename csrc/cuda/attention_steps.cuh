// Attention over samples of any length: a softmax that is rescaled from step to step of 128 keys.
//
// A persistent thread block: one warp loads, two warp groups of 64 queries each compute. Keys and
// values come through one ring of tiles in the order in which they are used: K0 K1 V0 K2 V1 ...
// While one group takes exponentials, the other's products run (they take turns in issuing them),
// and so do the group's own products of the weights before.
#pragma once

#include "attention_whole.cuh"

namespace beit3_fast::cuda {

template <int kHeadDim>
struct StepShape {
  using Shape = HeadShape<kHeadDim>;
  static constexpr int kKeys = 128;
  static constexpr int kGroups = 2;
  static constexpr int kThreads = 128 * (1 + kGroups);
  static constexpr int kTile = kQueries * kGroups;
  static constexpr int kSlots = Shape::kParts == 1 ? 8 : 6;  // of the ring
  // Products of fewer keys in the last block. For heads of 88 the compiler then runs out of
  // registers and serializes all products.
  static constexpr bool kShorterLast = Shape::kParts == 1;
  static constexpr int kSlotBytes = kKeys * Shape::kRowBytes;
  static constexpr int kQueryBytes = kQueries * Shape::kRowBytes;
  static constexpr int kBarriers = kSlots * kSlotBytes + kGroups * kQueryBytes;
  static constexpr int kBytes = kTileAlignment + kBarriers + 2 * (kSlots + kGroups) * 8;
};

// Addresses in shared memory: tiles and, behind them, a barrier for "full" and one for "free" each.
template <int kHeadDim>
struct StepTiles {
  using Shape = StepShape<kHeadDim>;
  uint32_t base;

  __device__ uint32_t slot(int i) const { return base + i * Shape::kSlotBytes; }
  __device__ uint32_t q(int group) const {
    return base + Shape::kSlots * Shape::kSlotBytes + group * Shape::kQueryBytes;
  }
  __device__ uint32_t full(int i) const { return base + Shape::kBarriers + 16 * i; }
  __device__ uint32_t free(int i) const { return full(i) + 8; }
  __device__ uint32_t q_full(int group) const { return full(Shape::kSlots + group); }
  __device__ uint32_t q_free(int group) const { return q_full(group) + 8; }
};

// A place in the ring, and the parity of its present round.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++slot < kSlots) return;
    slot = 0;
    parity ^= 1;
  }
};

// One query tile of one head of one sample.
template <int kHeadDim>
struct StepWork {
  Head head;
  int first;   // query
  int seen;    // keys that one of the queries sees
  int blocks;  // of keys

  __device__ StepWork(const AttentionCall& call, int index)
      : head(head_of(call.op, index / call.tiles / static_cast<int>(call.op.num_heads),
                     index / call.tiles % static_cast<int>(call.op.num_heads))),
        first(index % call.tiles * StepShape<kHeadDim>::kTile),
        seen(0),
        blocks(0) {
    if (!exists()) return;
    const int last = min(first + StepShape<kHeadDim>::kTile, head.queries.count()) - 1;
    seen = head.limit(call.op, last);
    blocks = (seen + StepShape<kHeadDim>::kKeys - 1) / StepShape<kHeadDim>::kKeys;
  }

  __device__ bool exists() const { return first < head.queries.count(); }

  __device__ static int count(const AttentionCall& call) {
    return call.tiles * static_cast<int>(call.op.num_heads * call.op.batch);
  }
};

template <int kHeadDim>
struct StepProducer {
  using Shape = StepShape<kHeadDim>;
  const AttentionMaps& maps;
  const AttentionCall& call;
  const StepTiles<kHeadDim> tiles;
  RingPlace<Shape::kSlots> place;
  uint32_t q_parity = 0;

  __device__ StepProducer(const AttentionMaps& maps, const AttentionCall& call,
                          const StepTiles<kHeadDim>& tiles)
      : maps(maps), call(call), tiles(tiles) {}

  __device__ void load(const RowMaps& map, const Head& head, int block) {
    barrier_wait(tiles.free(place.slot), place.parity ^ 1);
    if (lane_index() == 0) barrier_expect(tiles.full(place.slot), Shape::kSlotBytes);
    sync_warp();
    load_places<Shape::Shape::kParts, Shape::kKeys>(
        map, head.keys, static_cast<int>(call.op.num_keys), head.index, block * Shape::kKeys,
        tiles.slot(place.slot), tiles.full(place.slot));
    place.advance();
  }

  __device__ void load_tiles(const StepWork<kHeadDim>& work) {
    for (int group = 0; group < Shape::kGroups; ++group) {
      barrier_wait(tiles.q_free(group), q_parity ^ 1);
      load_queries<Shape::Shape::kParts>(maps.q, call.op, work.head, work.first + group * kQueries,
                                         tiles.q(group), tiles.q_full(group));
    }
    q_parity ^= 1;
  }

  __device__ void run() {
    const int count = StepWork<kHeadDim>::count(call);
    for (int index = block_index(); index < count; index += grid_size()) {
      const StepWork<kHeadDim> work(call, index);
      if (!work.exists()) continue;
      // The ring has room long before the tiles of the queries are free.
      if (work.blocks > 0) load(maps.k, work.head, 0);
      load_tiles(work);
      for (int block = 1; block < work.blocks; ++block) {
        load(maps.k, work.head, block);
        load(maps.v, work.head, block - 1);
      }
      if (work.blocks > 0) load(maps.v, work.head, work.blocks - 1);
    }
  }
};

// A warp group on one query tile after the other.
template <class T, int kHeadDim>
struct StepConsumer {
  using Shape = StepShape<kHeadDim>;
  static constexpr int kKeys = Shape::kKeys;
  static constexpr int kSums = HeadShape<kHeadDim>::kColumns / 2;
  const AttentionCall& call;
  const StepTiles<kHeadDim> tiles;
  const int group;
  RingPlace<Shape::kSlots> place;
  uint32_t q_parity = 0;

  __device__ StepConsumer(const AttentionCall& call, const StepTiles<kHeadDim>& tiles, int group)
      : call(call), tiles(tiles), group(group) {}

  // Barrier 1 + g: group g's turn to issue products.
  __device__ void take_turn() const { sync_named(1 + group, 256); }
  __device__ void pass_turn() const { arrive_named(2 - group, 256); }

  __device__ uint32_t wait_for_slot() const {
    barrier_wait(tiles.full(place.slot), place.parity);
    return tiles.slot(place.slot);
  }

  // A warp arrives once, when none of its lanes needs the tile any more.
  __device__ void leave(uint32_t free) const {
    sync_warp();
    if (lane_index() == 0) barrier_arrive(free);
  }

  __device__ void leave_slot() {
    leave(tiles.free(place.slot));
    place.advance();
  }

  // The first block of keys: nothing to add up yet.
  __device__ void first_block(const QueryPair& pair, Softmax& softmax, Weights<T, kKeys>& weights) {
    float scores[kKeys / 2];
    const uint32_t k = wait_for_slot();
    wgmma_fence();
    begin_scores<T, kHeadDim, kKeys, kKeys>(scores, tiles.q(group), k);
    wgmma_commit();
    wgmma_wait<0>(scores);
    leave_slot();
    float decay[2];
    softmax.weigh<kKeys>(scores, pair, 0, call.scale, decay);
    weights.take(scores);
  }

  // Scores of the first kNow keys of a block, while the weights of the block before meet their
  // values.
  template <int kNow>
  __device__ void next_block(const QueryPair& pair, int block, Softmax& softmax,
                             float (&sums)[kSums], const Weights<T, kKeys>& before,
                             Weights<T, kNow>& weights) {
    float scores[kNow / 2];
    const uint32_t k = wait_for_slot();
    const uint32_t k_free = tiles.free(place.slot);
    place.advance();
    const uint32_t v = wait_for_slot();
    take_turn();
    wgmma_fence();
    begin_scores<T, kHeadDim, kNow, kKeys>(scores, tiles.q(group), k);
    wgmma_commit();
    begin_sums<T, kHeadDim, kKeys, kKeys>(sums, before, v, block > 1);
    wgmma_commit();
    pass_turn();
    wgmma_wait<1>(scores);
    leave(k_free);
    float decay[2];
    softmax.weigh<kNow>(scores, pair, block * kKeys, call.scale, decay);
    wgmma_wait<0>(sums);
    leave_slot();
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] *= decay[i / 2 % 2];
    weights.take(scores);
  }

  template <int kNow>
  __device__ void last_values(float (&sums)[kSums], const Weights<T, kNow>& weights, bool add) {
    const uint32_t v = wait_for_slot();
    wgmma_fence();
    begin_sums<T, kHeadDim, kNow, kKeys>(sums, weights, v, add);
    wgmma_commit();
    wgmma_wait<0>(sums);
    leave_slot();
  }

  // The last of several blocks, of which no query sees more than kNow keys: 577 keys are 4 x 128 +
  // 80, 909 are 7 x 128 + 32.
  template <int kNow>
  __device__ void last_block(const QueryPair& pair, int block, Softmax& softmax,
                             float (&sums)[kSums], const Weights<T, kKeys>& before) {
    Weights<T, kNow> weights;
    next_block<kNow>(pair, block, softmax, sums, before, weights);
    leave(tiles.q_free(group));
    last_values<kNow>(sums, weights, true);
  }

  __device__ void meet_keys(const StepWork<kHeadDim>& work, const QueryPair& pair, Softmax& softmax,
                            float (&sums)[kSums]) {
    Weights<T, kKeys> weights;
    first_block(pair, softmax, weights);
    const int last = work.blocks - 1;
    const int rest = work.seen - last * kKeys;
    const bool shorter = Shape::kShorterLast && last > 0 && rest <= 80;
    for (int block = 1; block <= (shorter ? last - 1 : last); ++block) {
      next_block<kKeys>(pair, block, softmax, sums, weights, weights);
    }
    if constexpr (Shape::kShorterLast) {
      if (shorter && rest <= 32) return last_block<32>(pair, last, softmax, sums, weights);
      if (shorter) return last_block<80>(pair, last, softmax, sums, weights);
    }
    leave(tiles.q_free(group));
    last_values<kKeys>(sums, weights, last > 0);
  }

  __device__ void attend(const StepWork<kHeadDim>& work) {
    const QueryPair pair(call.op, work.head, work.first + group * kQueries);
    Softmax softmax;
    float sums[kSums];
    barrier_wait(tiles.q_full(group), q_parity);
    q_parity ^= 1;
    if (work.blocks > 0) {
      meet_keys(work, pair, softmax, sums);
    } else {
      leave(tiles.q_free(group));
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    }
    store_result<T, kHeadDim, RoundingOf<T, kHeadDim>>(call, work.head, pair, softmax, sums);
  }

  __device__ void run() {
    const int count = StepWork<kHeadDim>::count(call);
    if (group == 1) pass_turn();
    for (int index = block_index(); index < count; index += grid_size()) {
      const StepWork<kHeadDim> work(call, index);
      if (work.exists()) attend(work);
    }
    // The turn that the other group passed last.
    if (group == 0) take_turn();
  }
};

template <int kHeadDim>
__device__ void prepare_step_barriers(const StepTiles<kHeadDim>& tiles) {
  using Shape = StepShape<kHeadDim>;
  constexpr int kWarps = 4;  // of a group
  for (int i = 0; i < Shape::kSlots; ++i) {
    barrier_init(tiles.full(i), 1);
    barrier_init(tiles.free(i), kWarps * Shape::kGroups);
  }
  for (int group = 0; group < Shape::kGroups; ++group) {
    barrier_init(tiles.q_full(group), 1);
    barrier_init(tiles.q_free(group), kWarps);
  }
  fence_barrier_init();
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(StepShape<kHeadDim>::kThreads, 1)
    attend_in_steps(const __grid_constant__ AttentionMaps maps,
                    const __grid_constant__ AttentionCall call) {
  const StepTiles<kHeadDim> tiles{shared_memory(kTileAlignment)};
  if (thread_index() == 0) prepare_step_barriers(tiles);
  sync_block();
  if (warp_index() < 4) {
    lower_registers<40>();
    if (warp_index() == 0) StepProducer<kHeadDim>(maps, call, tiles).run();
  } else {
    raise_registers<232>();
    StepConsumer<T, kHeadDim>(call, tiles, warp_index() / 4 - 1).run();
  }
}

}  // namespace beit3_fast::cuda
