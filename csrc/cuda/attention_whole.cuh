// Attention over short samples: whole rows of scores in registers, the softmax in one pass, nothing
// rescaled.
//
// A thread block has one head of one sample. Its keys and values are loaded once; each of its warp
// groups goes through query tiles of 64. Loads are hidden behind the other thread blocks of the
// multiprocessor: three for heads of 64 and up to 200 keys.
#pragma once

#include "attention_float8.cuh"
#include "attention_loads.cuh"
#include "attention_products.cuh"

namespace beit3_fast::cuda {

template <int kHeadDim, int kKeys>
struct WholeShape {
  using Shape = HeadShape<kHeadDim>;
  // A second warp group for 88 shares the keys, of which shared memory holds one set only.
  static constexpr int kGroups = Shape::kParts;
  static constexpr int kBlocksPerProcessor = kGroups > 1 ? 1 : kKeys > 200 ? 2 : 3;  // by registers
  static constexpr int kThreads = 128 * kGroups;
  static constexpr int kValues = (kKeys + 15) / 16 * 16;  // products take 16 at a time
  static constexpr int kKeyBytes = kKeys * Shape::kRowBytes;
  static constexpr int kValueBytes = kValues * Shape::kRowBytes;
  static constexpr int kQueryBytes = kQueries * Shape::kRowBytes;
  static constexpr int kBarriers = kKeyBytes + kValueBytes + kGroups * kQueryBytes;
  static constexpr int kBytes = kTileAlignment + kBarriers + (2 + kGroups) * 8;
};

// Addresses in shared memory.
template <int kHeadDim, int kKeys>
struct WholeTiles {
  using Shape = WholeShape<kHeadDim, kKeys>;
  uint32_t k;
  uint32_t v;
  uint32_t q;  // of the own warp group, like q_full
  uint32_t k_full;
  uint32_t v_full;
  uint32_t q_full;

  __device__ WholeTiles(uint32_t base, int group)
      : k(base),
        v(k + Shape::kKeyBytes),
        q(v + Shape::kValueBytes + group * Shape::kQueryBytes),
        k_full(base + Shape::kBarriers),
        v_full(k_full + 8),
        q_full(v_full + 8 + group * 8) {}
};

// A warp group on its query tiles of one head.
template <class T, int kHeadDim, int kKeys>
struct WholeAttention {
  using Shape = WholeShape<kHeadDim, kKeys>;
  static constexpr int kParts = HeadShape<kHeadDim>::kParts;
  const AttentionMaps& maps;
  const AttentionCall& call;
  const Head head;
  const int group;
  const WholeTiles<kHeadDim, kKeys> tiles;
  uint32_t q_parity = 0;

  __device__ WholeAttention(const AttentionMaps& maps, const AttentionCall& call, const Head& head)
      : maps(maps),
        call(call),
        head(head),
        group(warp_index() / 4),
        tiles(shared_memory(kTileAlignment), group) {}

  __device__ void make_barriers() const {
    barrier_init(tiles.k_full, 1);
    barrier_init(tiles.v_full, 1);
    for (int i = 0; i < Shape::kGroups; ++i) barrier_init(tiles.v_full + 8 + 8 * i, 1);
    fence_barrier_init();
  }

  __device__ void load_tile(int first) const {
    if (warp_index() % 4 != 0 || first >= head.queries.count()) return;
    load_queries<kParts>(maps.q, call.op, head, first, tiles.q, tiles.q_full);
  }

  __device__ void load_keys() const {
    const int num_rows = static_cast<int>(call.op.num_keys);
    if (lane_index() == 0) {
      barrier_expect(tiles.k_full, Shape::kKeyBytes);
      barrier_expect(tiles.v_full, Shape::kValueBytes);
    }
    sync_warp();
    load_places<kParts, kKeys>(maps.k, head.keys, num_rows, head.index, 0, tiles.k, tiles.k_full);
    load_places<kParts, Shape::kValues>(maps.v, head.keys, num_rows, head.index, 0, tiles.v,
                                        tiles.v_full);
  }

  __device__ void multiply_keys(float (&scores)[kKeys / 2]) {
    barrier_wait(tiles.q_full, q_parity);
    q_parity ^= 1;
    barrier_wait(tiles.k_full, 0);
    wgmma_fence();
    begin_scores<T, kHeadDim, kKeys, kKeys>(scores, tiles.q, tiles.k);
    wgmma_commit();
    wgmma_wait<0>(scores);
  }

  // The tile of queries that begins at `first`; the one at `next` is loaded meanwhile.
  __device__ void attend(int first, int next) {
    const QueryPair pair(call.op, head, first);
    float scores[kKeys / 2];
    multiply_keys(scores);
    // All four warps are done with the queries.
    sync_named(1 + group, 128);
    load_tile(next);

    Softmax softmax;
    Weights<T, kKeys> weights;
    float decay[2];
    softmax.weigh<kKeys>(scores, pair, 0, call.scale, decay);
    weights.take(scores);

    float sums[HeadShape<kHeadDim>::kColumns / 2];
    barrier_wait(tiles.v_full, 0);
    wgmma_fence();
    begin_sums<T, kHeadDim, kKeys, Shape::kValues>(sums, weights, tiles.v, false);
    wgmma_commit();
    wgmma_wait<0>(sums);
    store_result<T, kHeadDim, RoundingOf<T, kHeadDim>>(call, head, pair, softmax, sums);
  }

  // The tiles `step`, `step + steps` and so on are the thread block's.
  __device__ void run(int step, int steps) {
    const int first = (step * Shape::kGroups + group) * kQueries;
    const int stride = steps * Shape::kGroups * kQueries;
    load_tile(first);
    if (warp_index() == 0) load_keys();
    for (int own = first; own < head.queries.count(); own += stride) attend(own, own + stride);
  }
};

template <class T, int kHeadDim, int kKeys>
__global__ void __launch_bounds__(WholeShape<kHeadDim, kKeys>::kThreads,
                                  WholeShape<kHeadDim, kKeys>::kBlocksPerProcessor)
    attend_whole(const __grid_constant__ AttentionMaps maps,
                 const __grid_constant__ AttentionCall call) {
  using Shape = WholeShape<kHeadDim, kKeys>;
  const int step = block_index() % call.tile_steps;
  const int heads = static_cast<int>(call.op.num_heads);
  const int index = block_index() / call.tile_steps;
  const Head head = head_of(call.op, index / heads, index % heads);
  // Nothing may be under way to the shared memory of a thread block that has ended.
  if (step * Shape::kGroups * kQueries >= head.queries.count()) return;
  WholeAttention<T, kHeadDim, kKeys> attention(maps, call, head);
  if (thread_index() == 0) attention.make_barriers();
  sync_block();
  attention.run(step, call.tile_steps);
}

}  // namespace beit3_fast::cuda
