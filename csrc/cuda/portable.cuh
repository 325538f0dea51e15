// What the kernels use of any NVIDIA GPU of compute capability 8.0 and newer, one thin function an
// instruction. The tests compile the kernels for the CPU, with an emulator in place of these.
//
// Addresses in shared memory are 32-bit numbers. Words hold two 16-bit or four 8-bit numbers, the
// lower ones first.
#pragma once

#ifdef BEIT3_FAST_EMULATE_CUDA
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace beit3_fast::cuda {

struct BFloat16 {};
struct Float16 {};
struct E4M3 {};  // of compute capability 8.9 and newer

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_index() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int grid_size() { return static_cast<int>(gridDim.x); }
__device__ __forceinline__ int lane_index() { return thread_index() % 32; }

// The same for all of a warp, which the compiler must see to keep its branches together.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(0xffffffffu, thread_index() / 32, 0);
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Barriers 1 to 15 of a thread block, for a multiple of 32 threads.
__device__ __forceinline__ void sync_named(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The highest of the warp's numbers.
__device__ __forceinline__ uint32_t max_of_warp(uint32_t value) {
  return __reduce_max_sync(0xffffffffu, value);
}

__device__ __forceinline__ uint32_t bits_of_float(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

// Within 2^-22 of the result; numbers below 2^-126 are zeros.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_root_fast(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded into a word.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack2<BFloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

template <>
__device__ __forceinline__ uint32_t pack2<Float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Into the lower half; past the largest number comes the largest one.
template <>
__device__ __forceinline__ uint32_t pack2<E4M3>(float low, float high) {
  uint16_t half;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(half) : "f"(high), "f"(low));
  return half;
}

template <class T>
__device__ __forceinline__ float low_of(uint32_t word);
template <class T>
__device__ __forceinline__ float high_of(uint32_t word);

template <>
__device__ __forceinline__ float low_of<BFloat16>(uint32_t word) {
  return __uint_as_float(word << 16);
}
template <>
__device__ __forceinline__ float high_of<BFloat16>(uint32_t word) {
  return __uint_as_float(word & 0xffff0000u);
}
template <>
__device__ __forceinline__ float low_of<Float16>(uint32_t word) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
}
template <>
__device__ __forceinline__ float high_of<Float16>(uint32_t word) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16)));
}

// Global memory, at a multiple of 16 bytes.
__device__ __forceinline__ void load_16_bytes(uint32_t (&words)[4], const void* from) {
  const uint4 four = *static_cast<const uint4*>(from);
  words[0] = four.x;
  words[1] = four.y;
  words[2] = four.z;
  words[3] = four.w;
}
__device__ __forceinline__ void store_16_bytes(void* to, const uint32_t (&words)[4]) {
  *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Global memory, at a multiple of 8 bytes.
__device__ __forceinline__ void store_two_words(void* to, uint32_t first, uint32_t second) {
  *static_cast<uint2*>(to) = make_uint2(first, second);
}
__device__ __forceinline__ void load_two(float& first, float& second, const float* from) {
  const float2 two = *reinterpret_cast<const float2*>(from);
  first = two.x;
  second = two.y;
}

__device__ __forceinline__ float load_shared(uint32_t from) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from) : "memory");
  return value;
}
// At a multiple of 16 bytes.
__device__ __forceinline__ void load_four_shared(float (&numbers)[4], uint32_t from) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(numbers[0]), "=f"(numbers[1]), "=f"(numbers[2]), "=f"(numbers[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

// The thread block's dynamic shared memory from the first multiple of `alignment` on.
__device__ __forceinline__ uint32_t shared_memory(int alignment) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const auto begin = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  return (begin + alignment - 1) / alignment * alignment;
}

// Copies `real` (0 or 16) bytes and fills up to 16 with zeros.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, int real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most kPending of the thread's newest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void load_transposed_matrices(uint32_t (&words)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// d[0..3] += a b for a [16, 16] and b [16, 8] of a warp; of 8-bit numbers a [16, 32], b [32, 8].
template <class T>
__device__ __forceinline__ void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<BFloat16>(float* d, const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<Float16>(float* d, const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<E4M3>(float* d, const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace beit3_fast::cuda

#endif
