// Attention for processors without warp-group products (compute capability 8.0 and newer): mma.sync
// and cp.async.
//
// A thread block has one query tile of one head: four warps of 16 queries each, keys and values in
// steps of 64, two stages. The softmax is that of attention_softmax.cuh, whose registers are laid
// out alike.
#pragma once

#include "attention_softmax.cuh"
#include "portable.cuh"

namespace beit3_fast::cuda {

template <int kHeadDim>
struct PortableShape {
  using Shape = HeadShape<kHeadDim>;
  static constexpr int kKeys = 64;
  static constexpr int kStages = 2;
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerProcessor = Shape::kParts == 1 ? 3 : 2;  // by registers
  static constexpr int kTileBytes = 64 * Shape::kRowBytes;  // 64 rows of queries, keys or values
  static constexpr int kBytes = kRowBytes + (1 + 2 * kStages) * kTileBytes;
};

// Where 16 bytes of a row lie in a tile of 64 rows.
__device__ inline uint32_t chunk_at(uint32_t tile, int row, int chunk) {
  const int part = chunk / 8;
  return tile + (part * 64 + row) * kRowBytes + ((chunk ^ row) % 8) * 16;
}

// A thread block begins to copy 64 places of a head; slots behind the last place and columns behind
// the last become zeros.
template <int kHeadDim>
__device__ void copy_places(const void* data, int64_t stride, const Places& places, int head,
                            int first, uint32_t tile) {
  constexpr int kChunks = HeadShape<kHeadDim>::kColumns / 8;
  const auto* columns = static_cast<const uint16_t*>(data) + head * kHeadDim;
#pragma unroll 2
  for (int i = thread_index(); i < 64 * kChunks; i += 128) {
    const int slot = i / kChunks;
    const int chunk = i % kChunks;
    const bool real = first + slot < places.count() && chunk < kHeadDim / 8;
    const auto* source = real ? columns + places.row(first + slot) * stride + 8 * chunk : columns;
    cp_async_16(chunk_at(tile, slot, chunk), source, real ? 16 : 0);
  }
}

template <class T, int kHeadDim>
struct PortableAttention {
  using Shape = PortableShape<kHeadDim>;
  static constexpr int kKeys = Shape::kKeys;
  static constexpr int kColumns = HeadShape<kHeadDim>::kColumns;
  const AttentionCall& call;
  const Head head;
  const uint32_t base;
  uint32_t q[kColumns / 16][4];
  float scores[kKeys / 2];
  float sums[kColumns / 2];
  Weights<T, kKeys> weights;

  __device__ PortableAttention(const AttentionCall& call, const Head& head, uint32_t base)
      : call(call), head(head), base(base) {}

  __device__ uint32_t k_tile(int block) const {
    return base + (1 + 2 * (block % Shape::kStages)) * Shape::kTileBytes;
  }
  __device__ uint32_t v_tile(int block) const { return k_tile(block) + Shape::kTileBytes; }

  __device__ void begin_block(int block) const {
    const SharedAttention& op = call.op;
    copy_places<kHeadDim>(op.k, op.k_stride, head.keys, head.index, block * kKeys, k_tile(block));
    copy_places<kHeadDim>(op.v, op.v_stride, head.keys, head.index, block * kKeys, v_tile(block));
  }

  __device__ void take_queries() {
    const int row = 16 * warp_index() + lane_index() % 16;
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
      load_matrices(q[step], chunk_at(base, row, 2 * step + lane_index() / 16));
    }
  }

  // scores = q k^T, 16 keys by 16 columns at a time.
  __device__ void multiply_keys(uint32_t tile) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) scores[i] = 0.0f;
    const int row = lane_index() / 16 * 8 + lane_index() % 8;
    const int chunk = lane_index() / 8 % 2;
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
#pragma unroll
      for (int key = 0; key < kKeys; key += 16) {
        uint32_t k[4];
        load_matrices(k, chunk_at(tile, key + row, 2 * step + chunk));
        mma<T>(scores + key / 2, q[step], k[0], k[1]);
        mma<T>(scores + key / 2 + 4, q[step], k[2], k[3]);
      }
    }
  }

  // sums += weights v, 16 keys by 16 columns at a time.
  __device__ void multiply_values(uint32_t tile) {
    const int row = lane_index() % 16;
    const int chunk = lane_index() / 16;
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
#pragma unroll
      for (int column = 0; column < kColumns; column += 16) {
        uint32_t v[4];
        load_transposed_matrices(v, chunk_at(tile, 16 * step + row, column / 8 + chunk));
        mma<T>(sums + column / 2, weights.words[step], v[0], v[1]);
        mma<T>(sums + column / 2 + 4, weights.words[step], v[2], v[3]);
      }
    }
  }

  __device__ void meet(const QueryPair& pair, int block, Softmax& softmax) {
    multiply_keys(k_tile(block));
    float decay[2];
    softmax.weigh<kKeys>(scores, pair, block * kKeys, call.scale, decay);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) sums[i] *= decay[i / 2 % 2];
    weights.take(scores);
    multiply_values(v_tile(block));
  }

  __device__ void run(int first) {
    const QueryPair pair(call.op, head, first);
    const int last = min(first + kQueries, head.queries.count()) - 1;
    const int blocks = (head.limit(call.op, last) + kKeys - 1) / kKeys;
    copy_places<kHeadDim>(call.op.q, call.op.q_stride, head.queries, head.index, first, base);
    begin_block(0);
    cp_async_commit();
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) sums[i] = 0.0f;
    Softmax softmax;
    for (int block = 0; block < blocks; ++block) {
      if (block + 1 < blocks) begin_block(block + 1);
      cp_async_commit();
      cp_async_wait<1>();
      sync_block();
      if (block == 0) take_queries();
      meet(pair, block, softmax);
      sync_block();
    }
    cp_async_wait<0>();
    store_result<T, kHeadDim, NoRounding>(call, head, pair, softmax, sums);
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(PortableShape<kHeadDim>::kThreads,
                                  PortableShape<kHeadDim>::kBlocksPerProcessor)
    attend_portable(const __grid_constant__ AttentionCall call) {
  const int heads = static_cast<int>(call.op.num_heads);
  const int first = block_index() % call.tiles * kQueries;
  const Head head =
      head_of(call.op, block_index() / call.tiles / heads, block_index() / call.tiles % heads);
  if (first >= head.queries.count()) return;
  PortableAttention<T, kHeadDim>(call, head, shared_memory(kRowBytes)).run(first);
}

}  // namespace beit3_fast::cuda
