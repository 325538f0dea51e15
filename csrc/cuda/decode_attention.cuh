// Attention of a decoding step (compute capability 8.0 and newer): memory gives the pace, so every
// key and value goes once from there into the registers in which mma.sync takes it.
//
// A thread block has 16 queries of one head and sequence. Its warps deal out the keys in steps of
// 16 and join their sums in shared memory at the end. Queries and keys are read as
// operand_loads.cuh says. Of the values, thread 4 g + t has columns 8 g .. 8 g + 7 of every 64 of
// keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9; so column i of product j is column 8 i + j.
#pragma once

#include <algorithm>
#include <cfloat>
#include <climits>

#include "attention_softmax.cuh"
#include "decode_attention.h"
#include "operand_loads.cuh"
#include "warp.cuh"

namespace beit3_fast::cuda {

constexpr int kDecodeQueries = 16;
constexpr int kDecodeKeys = 16;  // of a step

template <int kHeadDim>
struct DecodeShape {
  static constexpr int kMaxWarps = kHeadDim == 64 ? 16 : 8;  // by registers
  static constexpr int kThreads = 32 * kMaxWarps;            // at most
  static constexpr int kChunks = (kHeadDim + 31) / 32;       // of the columns of a query or key
  static constexpr int kParts = (kHeadDim + 63) / 64;        // of the columns of a value
  static constexpr int kRowFloats = kHeadDim + 2;            // sums, highest score, sum of weights
  static constexpr int kWarpBytes = kDecodeQueries * kRowFloats * 4;
  static constexpr int kBytes = 16 + kMaxWarps * kWarpBytes;
};

struct DecodeCall {
  DecodeAttention op;
  float scale;  // of op, times log2(e)
  int tiles;    // query tiles of a sequence
  int warps;    // of a thread block
};

template <class T, int kHeadDim>
struct DecodeTile {
  using Shape = DecodeShape<kHeadDim>;
  using Keys = uint32_t[2][Shape::kChunks][4];
  const DecodeCall& call;
  const int sequence;
  const int head;
  const int first;  // query
  const int group = lane_index() / 4;
  const int place = lane_index() % 4;
  uint16_t* k;  // the head's columns of the sample's first key
  uint16_t* v;
  uint32_t q[Shape::kChunks][2][4];  // left operands
  float sums[Shape::kParts][8][4];
  Softmax softmax;

  __device__ DecodeTile(const DecodeCall& call, int sequence, int head, int first)
      : call(call), sequence(sequence), head(head), first(first) {
    const DecodeAttention& op = call.op;
    const int64_t sample = op.samples == nullptr ? sequence : op.samples[sequence];
    k = static_cast<uint16_t*>(op.k) + sample * op.k_sample + head * kHeadDim;
    v = static_cast<uint16_t*>(op.v) + sample * op.v_sample + head * kHeadDim;
  }

  // Every thread block of a head and sequence writes the same, and reads what it wrote itself.
  __device__ void append() const {
    const DecodeAttention& op = call.op;
    if (op.num_new == 0) return;
    const int64_t begin = op.place == nullptr ? op.first : *op.place;
    const int64_t from_k = sequence * op.new_k_sequence + head * kHeadDim;
    const int64_t from_v = sequence * op.new_v_sequence + head * kHeadDim;
    for (int64_t i = thread_index(); i < op.num_new * (kHeadDim / 8); i += 32 * call.warps) {
      const int64_t row = i / (kHeadDim / 8), column = i % (kHeadDim / 8) * 8;
      const int64_t key = begin + row;
      if (key < 0 || key >= op.num_keys) continue;
      uint32_t words[4];
      const auto* new_k = static_cast<const uint16_t*>(op.new_k) + from_k;
      load_16_bytes(words, new_k + row * op.new_k_stride + column);
      store_16_bytes(k + key * op.k_stride + column, words);
      const auto* new_v = static_cast<const uint16_t*>(op.new_v) + from_v;
      load_16_bytes(words, new_v + row * op.new_v_stride + column);
      store_16_bytes(v + key * op.v_stride + column, words);
    }
    sync_block();
  }

  __device__ void take_queries() {
    const DecodeAttention& op = call.op;
    const auto* own = static_cast<const uint16_t*>(op.q) + sequence * op.q_sequence;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + group + 8 * half;
#pragma unroll
      for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
        const int column = 32 * chunk + 8 * place;
        uint32_t words[4];
        load_or_clear(words, own + row * op.q_stride + head * kHeadDim + column,
                      row < op.num_rows && column < kHeadDim);
#pragma unroll
        for (int i = 0; i < 4; ++i) q[chunk][i / 2][2 * (i % 2) + half] = words[i];
      }
    }
  }

  __device__ void load_keys(Keys& keys, int from) const {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const int key = from + 8 * block + group;
      const uint16_t* own = k + key * call.op.k_stride;
#pragma unroll
      for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
        const int column = 32 * chunk + 8 * place;
        load_or_clear(keys[block][chunk], own + column,
                      key < call.op.num_keys && column < kHeadDim);
      }
    }
  }

  __device__ void load_values(uint32_t (&values)[Shape::kParts][4][4], int from) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = from + 2 * place + i % 2 + 8 * (i / 2);
      const uint16_t* own = v + key * call.op.v_stride;
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
        const int column = 64 * part + 8 * group;
        load_or_clear(values[part][i], own + column, key < call.op.num_keys && column < kHeadDim);
      }
    }
  }

  __device__ void multiply_keys(float (&scores)[8], const Keys& keys) const {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[4 * block + i] = 0.0f;
#pragma unroll
      for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
        const uint32_t(&words)[4] = keys[block][chunk];
        mma<T>(scores + 4 * block, q[chunk][0], words[0], words[1]);
        mma<T>(scores + 4 * block, q[chunk][1], words[2], words[3]);
      }
    }
  }

  // Scores of keys that a row does not see become -inf.
  __device__ void hide(float (&scores)[8], int from) const {
    const DecodeAttention& op = call.op;
    if (from + kDecodeKeys <= op.front) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = first + group + 8 * (i / 2 % 2);
      const int key = from + 2 * place + i % 2 + 8 * (i / 4);
      bool seen = key < op.num_keys;
      if (seen && key >= op.front && row < op.num_rows) {
        seen = op.seen[sequence * op.seen_sequence + row * op.seen_stride + key - op.front] != 0;
      }
      if (!seen) scores[i] = -INFINITY;
    }
  }

  __device__ void multiply_values(const uint32_t (&weights)[4],
                                  const uint32_t (&values)[Shape::kParts][4][4]) {
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& own = values[part];
        mma<T>(sums[part][2 * i], weights, (own[0][i] & 0xffffu) | own[1][i] << 16,
               (own[2][i] & 0xffffu) | own[3][i] << 16);
        mma<T>(sums[part][2 * i + 1], weights, own[0][i] >> 16 | (own[1][i] & 0xffff0000u),
               own[2][i] >> 16 | (own[3][i] & 0xffff0000u));
      }
    }
  }

  __device__ void meet(const Keys& keys, const uint32_t (&values)[Shape::kParts][4][4], int from) {
    float scores[8], decay[2];
    multiply_keys(scores, keys);
    hide(scores, from);
    softmax.weigh_visible(scores, call.scale, decay);
    Weights<T, kDecodeKeys> weights;
    weights.take(scores);
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 32; ++i) sums[part][i / 4][i % 4] *= decay[i / 2 % 2];
    }
    multiply_values(weights.words[0], values);
  }

  __device__ void walk() {
#pragma unroll
    for (int i = 0; i < 32 * Shape::kParts; ++i) sums[i / 32][i / 4 % 8][i % 4] = 0.0f;
    take_queries();
    Keys keys, next;
    int from = warp_index() * kDecodeKeys;
    load_keys(next, from);
    while (from < call.op.num_keys) {
      const int behind = from + call.warps * kDecodeKeys;
      uint32_t values[Shape::kParts][4][4];
      load_values(values, from);
#pragma unroll
      for (int i = 0; i < 8 * Shape::kChunks; ++i) {
        keys[i / 4 % 2][i / 8][i % 4] = next[i / 4 % 2][i / 8][i % 4];
      }
      load_keys(next, behind);
      meet(keys, values, from);
      from = behind;
    }
  }

  __device__ static uint32_t row_at(uint32_t base, int warp, int row) {
    return base + warp * Shape::kWarpBytes + row * Shape::kRowFloats * 4;
  }

  // The warp's share, for the others to see.
  __device__ void show(uint32_t base) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = row_at(base, warp_index(), group + 8 * half);
#pragma unroll
      for (int i = 0; i < 16 * Shape::kParts; ++i) {
        const int column = 64 * (i / 16) + 8 * (2 * place + i % 2) + i / 2 % 8;
        if (column < kHeadDim) {
          store_shared(row + 4 * column, sums[i / 16][i / 2 % 8][2 * half + i % 2]);
        }
      }
      const float total = quad_sum(softmax.total[half]);
      if (place == 0) {
        store_shared(row + 4 * kHeadDim, softmax.top[half]);
        store_shared(row + 4 * kHeadDim + 4, total);
      }
    }
  }

  // Eight columns of a row, of all warps together.
  __device__ void join(uint32_t (&words)[4], uint32_t base, int row, int column) const {
    float highest = -INFINITY;
    for (int warp = 0; warp < call.warps; ++warp) {
      highest = fmaxf(highest, load_shared(row_at(base, warp, row) + 4 * kHeadDim));
    }
    // A row that sees no key: any finite number instead of inf - inf.
    if (highest == -INFINITY) highest = 0.0f;
    float eight[8] = {}, total = 0.0f;
    for (int warp = 0; warp < call.warps; ++warp) {
      const uint32_t own = row_at(base, warp, row);
      const float factor = exp2_fast((load_shared(own + 4 * kHeadDim) - highest) * call.scale);
      total += factor * load_shared(own + 4 * kHeadDim + 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) eight[i] += factor * load_shared(own + 4 * (column + i));
    }
    const float factor = 1.0f / (total == 0.0f ? 1.0f : total);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = pack2<T>(eight[2 * i] * factor, eight[2 * i + 1] * factor);
    }
  }

  // Of the row whose columns the lanes have; those that have none bring zeros.
  __device__ void measure(const uint32_t (&words)[4], bool real, float* at) const {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (const uint32_t word : words) sum += low_of<T>(word) + high_of<T>(word);
    const float mean = sum_of_warp(sum) / kHeadDim;
#pragma unroll
    for (const uint32_t word : words) {
      const float low = low_of<T>(word) - mean, high = high_of<T>(word) - mean;
      if (real) squares += low * low + high * high;
    }
    squares = sum_of_warp(squares);
    if (lane_index() == 0) {
      at[0] = mean;
      at[1] = squares;
    }
  }

  // A warp's row: each of its first lanes has eight columns.
  __device__ void finish(uint32_t base, int row) const {
    const DecodeAttention& op = call.op;
    const int64_t at = (sequence * op.num_rows + first + row) * op.num_heads + head;
    const int column = 8 * lane_index();
    const bool real = column < kHeadDim;
    uint32_t words[4] = {0, 0, 0, 0};
    if (real) {
      join(words, base, row, column);
      store_16_bytes(static_cast<uint16_t*>(op.o) + at * kHeadDim + column, words);
    }
    if (op.parts != nullptr) measure(words, real, op.parts + 2 * at);
  }

  __device__ void run(uint32_t base) {
    append();
    walk();
    show(base);
    sync_block();
    const int rows = min(kDecodeQueries, static_cast<int>(call.op.num_rows) - first);
    for (int row = warp_index(); row < rows; row += call.warps) finish(base, row);
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(DecodeShape<kHeadDim>::kThreads)
    attend_cached(const __grid_constant__ DecodeCall call) {
  const int heads = static_cast<int>(call.op.num_heads);
  const int tile = block_index() / heads;
  DecodeTile<T, kHeadDim>(call, tile / call.tiles, block_index() % heads,
                          tile % call.tiles * kDecodeQueries)
      .run(shared_memory(16));
}

struct DecodeLaunch {
  DecodeCall call;
  int blocks;
  int threads;
  int shared_bytes;
};

// Few blocks get more warps each, so that enough of a lone image's keys are under way at a time.
template <int kHeadDim>
DecodeLaunch decode_launch(const DecodeAttention& op, int processors) {
  using Shape = DecodeShape<kHeadDim>;
  constexpr int64_t kWarpsOfProcessor = 16;
  // With a scale of 0, hidden scores would become 0 * -inf.
  const float scale = std::max(op.scale * 1.4426950408889634f, FLT_MIN);
  const int64_t tiles = (op.num_rows + kDecodeQueries - 1) / kDecodeQueries;
  const int64_t blocks = op.num_sequences * op.num_heads * tiles;
  const int64_t steps = (op.num_keys + kDecodeKeys - 1) / kDecodeKeys;
  int warps = 4;
  while (2 * warps <= Shape::kMaxWarps && 2 * warps <= steps &&
         2 * warps * blocks <= kWarpsOfProcessor * processors) {
    warps *= 2;
  }
  const DecodeCall call{op, scale, static_cast<int>(tiles), warps};
  return {call, static_cast<int>(blocks), 32 * warps, 16 + warps * Shape::kWarpBytes};
}

inline const char* decode_obstacle(const DecodeAttention& op) {
  const auto fits = [](const void* data, int64_t outer, int64_t inner) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && outer % 8 == 0 && inner % 8 == 0;
  };
  if (op.head_dim != 64 && op.head_dim != 88) return "takes heads of 64 or 88 columns";
  if (!fits(op.q, op.q_sequence, op.q_stride) || !fits(op.k, op.k_sample, op.k_stride) ||
      !fits(op.v, op.v_sample, op.v_stride) || !fits(op.o, 0, 0) ||
      !fits(op.new_k, op.new_k_sequence, op.new_k_stride) ||
      !fits(op.new_v, op.new_v_sequence, op.new_v_stride)) {
    return "takes rows that begin at multiples of 16 bytes";
  }
  if (op.front < 0 || op.front > op.num_keys) return "takes a front of at most all keys";
  if (op.num_keys > INT_MAX / 2 || op.num_rows > INT_MAX / 2) return "takes at most 2^30 rows";
  const int64_t tiles = (op.num_rows + kDecodeQueries - 1) / kDecodeQueries;
  if (op.num_sequences * op.num_heads * tiles > INT_MAX) return "takes at most 2^31 - 1 tiles";
  return nullptr;
}

// run(T{}, std::integral_constant<int, width>{}) for the call's element and width of heads.
template <class Run>
auto with_decode_types(const DecodeAttention& op, Run run) {
  using Narrow = std::integral_constant<int, 64>;
  using Wide = std::integral_constant<int, 88>;
  if (op.element == DecodeAttention::Element::kFloat16) {
    return op.head_dim == Narrow::value ? run(Float16{}, Narrow{}) : run(Float16{}, Wide{});
  }
  return op.head_dim == Narrow::value ? run(BFloat16{}, Narrow{}) : run(BFloat16{}, Wide{});
}

}  // namespace beit3_fast::cuda
