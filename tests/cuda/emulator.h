// csrc/cuda/portable.cuh and hopper.cuh for the CPU: the same functions, doing what the PTX manual
// says of their instructions, as late as it allows.
#pragma once

#include <algorithm>

#include "emulated_products.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace beit3_fast::cuda {

using std::max;
using std::min;

struct BFloat16 {
  static constexpr auto number = emulated::bfloat16_number;
  static constexpr auto bits = emulated::bfloat16_bits;
  static constexpr emulated::Format format{2, number};
};
struct Float16 {
  static constexpr auto number = emulated::float16_number;
  static constexpr auto bits = emulated::float16_bits;
  static constexpr emulated::Format format{2, number};
};
struct E4M3 {
  static constexpr auto number = emulated::e4m3_number;
  static constexpr emulated::Format format{1, number};
};

using TensorMap = TiledTensor;

inline const char* make_tensor_map(TensorMap& map, const TiledTensor& tensor) {
  map = tensor;
  return tiled_tensor_obstacle(tensor);
}

inline int thread_index() { return emulated::block->current; }
inline int block_index() { return emulated::block->index; }
inline int grid_size() { return emulated::block->launch.grid; }
inline int cluster_rank() { return emulated::block->rank(); }
inline int lane_index() { return thread_index() % 32; }
inline int warp_index() { return thread_index() / 32; }

inline void sync_warp() { emulated::meet_lanes("syncwarp", {}); }
inline void sync_block() { emulated::arrive_at_named(0, emulated::block->launch.threads, true); }
inline void sync_named(int barrier, int threads) {
  emulated::arrive_at_named(barrier, threads, true);
}
inline void arrive_named(int barrier, int threads) {
  emulated::arrive_at_named(barrier, threads, false);
}

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  return emulated::meet_lanes("shuffle", {value})[lane_index() ^ mask][0];
}
inline float shuffle_xor(float value, int mask) {
  return emulated::float_of(shuffle_xor(emulated::bits_of(value), mask));
}

inline uint32_t max_of_warp(uint32_t value) {
  const emulated::LaneValue* all = emulated::meet_lanes("redux", {value});
  for (int lane = 0; lane < 32; ++lane) value = max(value, all[lane][0]);
  return value;
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float reciprocal_root_fast(float x) { return 1.0f / sqrtf(x); }

inline uint32_t bits_of_float(float value) { return emulated::bits_of(value); }
inline float float_of_bits(uint32_t bits) { return emulated::float_of(bits); }

template <class T>
uint32_t pack2(float low, float high) {
  return T::bits(low) | static_cast<uint32_t>(T::bits(high)) << 16;
}
template <>
inline uint32_t pack2<E4M3>(float low, float high) {
  return static_cast<uint32_t>(emulated::e4m3_bits(low) | emulated::e4m3_bits(high) << 8);
}
template <class T>
float low_of(uint32_t word) {
  return T::number(static_cast<uint16_t>(word));
}
template <class T>
float high_of(uint32_t word) {
  return T::number(static_cast<uint16_t>(word >> 16));
}

inline void check_16_bytes(const void* at) {
  emulated::check(reinterpret_cast<uintptr_t>(at) % 16 == 0, "16 bytes at no multiple of them");
}
inline void load_16_bytes(uint32_t (&words)[4], const void* from) {
  check_16_bytes(from);
  std::memcpy(words, from, 16);
}
inline void store_16_bytes(void* to, const uint32_t (&words)[4]) {
  check_16_bytes(to);
  std::memcpy(to, words, 16);
}

inline void store_two_words(void* to, uint32_t first, uint32_t second) {
  emulated::check(reinterpret_cast<uintptr_t>(to) % 8 == 0, "8 bytes at no multiple of them");
  const uint32_t words[2] = {first, second};
  std::memcpy(to, words, 8);
}

inline void load_two(float& first, float& second, const float* from) {
  emulated::check(reinterpret_cast<uintptr_t>(from) % 8 == 0, "8 bytes at no multiple of them");
  first = from[0];
  second = from[1];
}

inline float load_shared(uint32_t from) {
  emulated::check(from % 4 == 0, "4 bytes at no multiple of them");
  float value;
  std::memcpy(&value, emulated::block->at(from, 4), 4);
  return value;
}
inline void load_four_shared(float (&numbers)[4], uint32_t from) {
  emulated::check(from % 16 == 0, "16 bytes at no multiple of them");
  std::memcpy(numbers, emulated::block->at(from, 16), 16);
}
inline void store_shared(uint32_t to, float value) {
  emulated::check(to % 4 == 0, "4 bytes at no multiple of them");
  std::memcpy(emulated::block->at(to, 4), &value, 4);
}

inline uint32_t shared_memory(int alignment) {
  return (emulated::kSharedBase + alignment - 1) / alignment * alignment;
}

inline void cp_async_16(uint32_t to, const void* from, int real) {
  emulated::begin_copy(to, from, real);
}
inline void cp_async_commit() { emulated::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulated::wait_for_copies(kPending);
}

inline void load_matrices(uint32_t (&words)[4], uint32_t row) {
  emulated::read_matrices(words, row, false);
}
inline void load_transposed_matrices(uint32_t (&words)[4], uint32_t row) {
  emulated::read_matrices(words, row, true);
}
template <class T>
void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::multiply_in_warp(d, a, b0, b1, T::format);
}

template <int kRegisters>
void lower_registers() {
  emulated::set_registers(kRegisters, false);
}
template <int kRegisters>
void raise_registers() {
  emulated::set_registers(kRegisters, true);
}

inline void barrier_init(uint32_t barrier, int arrivals) {
  emulated::make_barrier(barrier, arrivals);
}
inline void fence_barrier_init() {
  for (auto& [address, barrier] : emulated::block->barriers) {
    if (barrier.maker == thread_index()) barrier.fenced = true;
  }
}
inline void barrier_arrive(uint32_t barrier) { emulated::arrive(barrier, 0); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { emulated::arrive(barrier, bytes); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulated::wait_for_phase(barrier, parity);
}

inline void sync_cluster() { emulated::meet_cluster(); }
inline void barrier_arrive_in_cluster(uint32_t barrier, int rank) {
  emulated::arrive_in_cluster(barrier, rank);
}

inline uint32_t in_cluster(uint32_t address, int rank) { return emulated::mapped(address, rank); }
inline void store_four_in_cluster(uint32_t to, const float* numbers) {
  emulated::store_in_cluster(to, numbers, 4);
}
inline void store_two_in_cluster(uint32_t to, float first, float second) {
  const float numbers[2] = {first, second};
  emulated::store_in_cluster(to, numbers, 2);
}

inline void tma_load_2d(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y) {
  emulated::load_box(to, map, barrier, 2, x, y, 0, 1 << cluster_rank());
}
inline void tma_load_3d(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y, int z) {
  emulated::load_box(to, map, barrier, 3, x, y, z, 1 << cluster_rank());
}
inline void tma_multicast_2d(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y,
                             uint16_t blocks) {
  emulated::load_box(to, map, barrier, 2, x, y, 0, blocks);
}
inline void tma_multicast_3d(uint32_t to, const TensorMap& map, uint32_t barrier, int x, int y,
                             int z, uint16_t blocks) {
  emulated::load_box(to, map, barrier, 3, x, y, z, blocks);
}

inline void fence_async_proxy() { emulated::fence_written_chunks(); }

inline void wgmma_fence() { emulated::block->self().fenced = true; }
inline void wgmma_commit() { ++emulated::block->self().groups; }
template <int kPending, int... kSizes>
void wgmma_wait([[maybe_unused]] float (&... sums)[kSizes]) {
  emulated::wait_for_products(kPending);
}
template <class T, int kColumns>
void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
  emulated::begin_product({d, kColumns, false, nullptr, a, b, add, T::format, 0});
}
template <class T, int kColumns>
void wgmma_transposed(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulated::begin_product({d, kColumns, true, a, 0, b, add, T::format, 0});
}

}  // namespace beit3_fast::cuda
