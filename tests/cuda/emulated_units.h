// The units of a multiprocessor that kernels start and wait for: barriers, copies, products.
#pragma once

#include <cmath>

#include "emulated_block.h"
#include "tensor_map.h"

namespace beit3_fast::emulated {

using cuda::TiledTensor;

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bfloat16_number(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int fraction = bits & 1023;
  float value;
  if (exponent == 31) {
    value = fraction ? NAN : INFINITY;
  } else {
    value = std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction),
                       std::max(exponent, 1) - 25);
  }
  return bits >> 15 ? -value : value;
}

inline float float16_number(uint16_t bits) {
  static const std::vector<float> all = [] {
    std::vector<float> values(65536);
    for (int i = 0; i < 65536; ++i) values[i] = float16_value(static_cast<uint16_t>(i));
    return values;
  }();
  return all[bits];
}

inline uint16_t float16_bits(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
  const uint32_t size = bits_of(value) & 0x7fffffffu;
  uint32_t bits;
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x477ff000u) {
    bits = 0x7c00;
  } else if (size < 0x38800000u) {
    bits = static_cast<uint32_t>(std::nearbyint(float_of(size) * 0x1p24f));
  } else {
    bits = (size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | bits);
}

// Four bits of exponent, three of fraction; no infinity, and one NaN of each sign.
inline float e4m3_number(uint16_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if ((bits & 127) == 127) return NAN;
  const float size = std::ldexp(static_cast<float>(exponent ? fraction + 8 : fraction),
                                std::max(exponent, 1) - 10);
  return bits & 128 ? -size : size;
}

// cvt.rn.satfinite: to the nearest, halves to even; what is larger than 448 becomes 448.
inline uint16_t e4m3_bits(float value) {
  const uint32_t sign = bits_of(value) >> 24 & 128;
  const float size = std::fabs(value);
  if (size != size) return 127;
  if (size >= 448.0f) return static_cast<uint16_t>(sign | 126);
  const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 3 - exponent)));
  // A step past the last fraction is the next exponent.
  return static_cast<uint16_t>(sign | ((exponent + 6) * 8 + steps));
}

// Bits 4 to 6 of an address are changed by its bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline std::string name_of(uint32_t address) { return "barrier " + std::to_string(address); }

constexpr uint64_t kBarrierMark = 0x6261727269657221;

inline MemoryBarrier& barrier_at(uint32_t address, bool by_thread = true) {
  check(address % 8 == 0, [&] { return name_of(address) + " lies at no multiple of 8 bytes"; });
  const auto found = block->barriers.find(address);
  check(found != block->barriers.end(), [&] { return name_of(address) + " was not made"; });
  uint64_t mark;
  std::memcpy(&mark, block->at(address, 8), 8);
  check(mark == kBarrierMark, [&] { return name_of(address) + " was written over"; });
  const bool own = by_thread && found->second.maker == block->current;
  check(own || found->second.fenced,
        [&] { return name_of(address) + " is used without a fence after it was made"; });
  return found->second;
}

inline void make_barrier(uint32_t address, int arrivals) {
  check(arrivals > 0 && arrivals < 1 << 20, "a barrier of no arrivals");
  check(block->barriers.count(address) == 0, [&] { return name_of(address) + " is made twice"; });
  block->barriers[address] = {arrivals, arrivals, 0, 0, block->current, false, {}};
  std::memcpy(block->at(address, 8), &kBarrierMark, 8);
}

inline void complete_phase(MemoryBarrier& barrier) {
  check(std::abs(barrier.bytes) < 1 << 20, "a barrier counts too many bytes");
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.expected;
  barrier.phase ^= 1;
  block->wake(barrier.waiters);
}

inline void arrive(uint32_t address, int64_t bytes, bool by_thread = true) {
  MemoryBarrier& barrier = barrier_at(address, by_thread);
  check(barrier.pending > 0,
        [&] { return name_of(address) + " gets more arrivals than it was made for"; });
  barrier.bytes += bytes;
  --barrier.pending;
  complete_phase(barrier);
}

// What is done while one of these lives is done to another block of the cluster.
class InBlock {
 public:
  explicit InBlock(Block& other) : own_(block) { block = &other; }
  ~InBlock() { block = own_; }

 private:
  Block* own_;
};

inline void arrive_in_cluster(uint32_t address, int rank) {
  const InBlock there(block->cluster.running(rank, "a thread arrives"));
  arrive(address, 0, false);
}

inline void meet_cluster() {
  Cluster& cluster = block->cluster;
  const uint32_t phase = cluster.phase;
  ++cluster.arrived;
  cluster.complete_phase();
  while (cluster.phase == phase) block->wait(block->cluster_waiters, "the cluster's barrier");
}

inline void wait_for_phase(uint32_t address, uint32_t parity) {
  check(parity <= 1, "a parity is 0 or 1");
  MemoryBarrier& barrier = barrier_at(address);
  while (barrier.phase == parity) {
    block->wait(barrier.waiters, "barrier", address);
  }
}

inline void arrive_at_named(int number, int size, bool waits) {
  check(number >= 0 && number < 16, "named barriers are 0 to 15");
  check(size > 0 && size % 32 == 0, "a named barrier is for whole warps");
  NamedBarrier& barrier = block->named[number];
  check(barrier.arrived == 0 || barrier.size == size,
        "threads meet at a named barrier with different numbers");
  barrier.size = size;
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    block->wake(barrier.waiters);
  } else if (waits) {
    block->wait(barrier.waiters, "named barrier", number);
  }
}

// Every lane shows a value and sees those of all 32.
inline const LaneValue* meet_lanes(const char* instruction, const LaneValue& value) {
  Warp& warp = block->warp();
  check(warp.arrived == 0 || std::strcmp(warp.instruction, instruction) == 0, [&] {
    return std::string("lanes of a warp meet at ") + instruction + " and " + warp.instruction;
  });
  warp.instruction = instruction;
  const int round = warp.round;
  warp.values[round % 2][block->current % 32] = value;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.round;
    block->wake(warp.waiters);
  } else {
    block->wait(warp.waiters, instruction);
  }
  return warp.values[round % 2];
}

inline void set_registers(int registers, bool raise) {
  Thread& thread = block->self();
  check(registers % 8 == 0 && registers >= 24 && registers <= 256,
        "registers in steps of 8, from 24 to 256");
  check(raise ? registers >= thread.registers : registers <= thread.registers, [&] {
    return "setmaxnreg in the wrong direction: from " + std::to_string(thread.registers);
  });
  const int more = registers - thread.registers;
  while (block->free_registers < more) block->wait(block->register_waiters, "registers");
  block->free_registers -= more;
  thread.registers = registers;
  block->wake(block->register_waiters);
}

inline bool happens_now() {
  const Order order = block->launch.order;
  return order == Order::kEager || (order == Order::kRandom && block->chance(2));
}

// An address in the shared memory of the block of that rank.
constexpr int kRankBit = 24;
inline uint32_t mapped(uint32_t address, int rank) {
  check(rank >= 0 && rank < block->launch.cluster, "no such block in the cluster");
  return address | static_cast<uint32_t>(rank + 1) << kRankBit;
}

// Comes at any time until the cluster meets. A block that may not have begun has no shared memory
// yet.
inline void store_in_cluster(uint32_t to, const float* numbers, uint32_t count) {
  check(to >> kRankBit != 0, "an address that is not mapped to a block");
  check(block->cluster.meetings > 0, "a store to a block that may not have begun");
  const uint32_t place = to & ((1u << kRankBit) - 1);
  check(place % (4 * count) == 0, "a store at no multiple of its bytes");
  const std::vector<float> kept(numbers, numbers + count);
  Block& there = block->cluster.running(static_cast<int>(to >> kRankBit) - 1, "a store");
  const auto store = [&there, place, kept] {
    const auto bytes = static_cast<uint32_t>(4 * kept.size());
    std::memcpy(there.at(place, bytes), kept.data(), bytes);
  };
  if (happens_now()) {
    store();
  } else {
    block->cluster.stores.push_back(store);
  }
}

inline int64_t index_in(const TiledTensor& tensor, int dimension, int start, int step) {
  const int64_t index = static_cast<int64_t>(start) + step;
  return index >= 0 && index < tensor.sizes[dimension] ? index : -1;
}

inline void copy_box(const TiledTensor& tensor, uint32_t to, uint32_t barrier,
                     const int (&start)[3]) {
  const auto* data = static_cast<const uint8_t*>(tensor.data);
  uint32_t place = to;
  for (int z = 0; z < (tensor.rank > 2 ? tensor.box[2] : 1); ++z) {
    for (int y = 0; y < tensor.box[1]; ++y) {
      const int64_t plane = tensor.rank > 2 ? index_in(tensor, 2, start[2], z) : 0;
      const int64_t row = index_in(tensor, 1, start[1], y);
      for (int x = 0; x < tensor.box[0]; ++x, place += 2) {
        const int64_t column = index_in(tensor, 0, start[0], x);
        uint16_t number = 0;
        if (plane >= 0 && row >= 0 && column >= 0) {
          const int64_t behind = plane * tensor.strides[1] + row * tensor.strides[0] + column * 2;
          std::memcpy(&number, data + behind, 2);
        }
        std::memcpy(block->at(swizzled(place), 2), &number, 2);
      }
    }
  }
  MemoryBarrier& waiting = barrier_at(barrier, false);
  waiting.bytes -= place - to;
  complete_phase(waiting);
}

// To every block of the cluster whose bit is set, each at a time of its own.
inline void load_box(uint32_t to, const TiledTensor& tensor, uint32_t barrier, int rank, int x,
                     int y, int z, uint32_t blocks) {
  const char* obstacle = tiled_tensor_obstacle(tensor);
  check(obstacle == nullptr, obstacle == nullptr ? "" : obstacle);
  check(tensor.rank == rank, "a tensor of another rank");
  check(to % 128 == 0, "a box is to lie at a multiple of 128 bytes");
  // With fewer bytes than the swizzle has, a row would still take 128.
  check(tensor.box[0] == 64, "boxes of whole 128-byte rows only are emulated");
  check(blocks != 0, "a copy to no block");
  const auto copy = [=] { copy_box(tensor, to, barrier, {x, y, z}); };
  for (int other = 0; blocks >> other != 0; ++other) {
    if ((blocks >> other & 1) == 0) continue;
    const InBlock there(block->cluster.running(other, "a copy comes"));
    if (happens_now()) {
      copy();
    } else {
      block->copies.push_back(copy);
    }
  }
}

inline void carry_out(const AsyncCopy& copy) {
  uint8_t* to = block->at(copy.to, 16);
  std::memset(to, 0, 16);
  std::memcpy(to, copy.from, copy.real);
}

inline void begin_copy(uint32_t to, const void* from, int real) {
  check(to % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0,
        "cp.async of 16 bytes at no multiple of them");
  check(real == 0 || real == 16, "cp.async of 0 or 16 bytes");
  Thread& thread = block->self();
  block->at(to, 16);
  block->unfenced[(to - kSharedBase) / 16] = 1;
  thread.unfenced_chunks.push_back((to - kSharedBase) / 16);
  if (happens_now()) {
    carry_out({to, from, real});
  } else {
    thread.open_copies.push_back({to, from, real});
  }
}

inline void commit_copies() {
  Thread& thread = block->self();
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

inline void wait_for_copies(size_t pending) {
  Thread& thread = block->self();
  while (thread.copy_groups.size() > pending) {
    for (const AsyncCopy& copy : thread.copy_groups.front()) carry_out(copy);
    thread.copy_groups.pop_front();
  }
}

// The fence covers what is there: not copies that are still under way.
inline void fence_written_chunks() {
  Thread& thread = block->self();
  std::set<uint32_t> under_way;
  for (const AsyncCopy& copy : thread.open_copies) under_way.insert((copy.to - kSharedBase) / 16);
  for (const auto& group : thread.copy_groups) {
    for (const AsyncCopy& copy : group) under_way.insert((copy.to - kSharedBase) / 16);
  }
  std::vector<uint32_t> left;
  for (const uint32_t chunk : thread.unfenced_chunks) {
    if (under_way.count(chunk)) {
      left.push_back(chunk);
    } else {
      block->unfenced[chunk] = 0;
    }
  }
  thread.unfenced_chunks = std::move(left);
}

}  // namespace beit3_fast::emulated
