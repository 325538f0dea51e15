// What the kernels use of compute capability 9.0 beyond portable.cuh: barriers in shared memory,
// the tensor memory accelerator, products of warp groups.
#pragma once

#include "portable.cuh"

#ifndef BEIT3_FAST_EMULATE_CUDA

#include <cuda.h>

#include "tensor_map.h"

namespace beit3_fast::cuda {

using TensorMap = CUtensorMap;

// For a kernel's __grid_constant__. Returns why it could not be made, or null.
const char* make_tensor_map(TensorMap& map, const TiledTensor& tensor);

// Registers of each thread of a warp group: fewer, or more once others have given them up.
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A barrier of 8 bytes completes a phase when all arrivals and all expected bytes have come.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// The barriers that this thread made are seen by all, the accelerator included.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and has the present phase expect so many bytes more.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Until the present phase is not the one of this parity: a new barrier is in the phase of parity 0.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// Blocks of a cluster run at the same time and reach each other's shared memory.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster meet, and see what the others wrote before.
__device__ __forceinline__ void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
// Arrives at the barrier that lies at the same place in the block of that rank. Of this thread's
// memory accesses no other block learns by it (.release.cluster would wait for all of them in L2).
__device__ __forceinline__ void barrier_arrive_in_cluster(uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// The same place in the block of that rank, for stores into its shared memory. Its threads see them
// behind sync_cluster.
__device__ __forceinline__ uint32_t in_cluster(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void store_four_in_cluster(uint32_t to, const float* numbers) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(numbers[0]),
               "f"(numbers[1]), "f"(numbers[2]), "f"(numbers[3])
               : "memory");
}
__device__ __forceinline__ void store_two_in_cluster(uint32_t to, float first, float second) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(first), "f"(second)
               : "memory");
}

// Loads a box that begins at element (x, y) or (x, y, z), x along the rows. Elements outside the
// tensor are zeros, and count as bytes.
__device__ __forceinline__ void tma_load_2d(uint32_t to, const TensorMap& map, uint32_t barrier,
                                            int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void tma_load_3d(uint32_t to, const TensorMap& map, uint32_t barrier,
                                            int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// As tma_load_2d and tma_load_3d, to the same place in every block of the cluster whose bit is set,
// where it counts at the barrier of the same place.
__device__ __forceinline__ void tma_multicast_2d(uint32_t to, const TensorMap& map,
                                                 uint32_t barrier, int x, int y, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}
__device__ __forceinline__ void tma_multicast_3d(uint32_t to, const TensorMap& map,
                                                 uint32_t barrier, int x, int y, int z,
                                                 uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}

// What this thread wrote to shared memory, by stores or finished cp_async, is seen by products.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Before the first product, and again when a thread has touched registers of products.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the newest groups are under way. `sums` are those that may be read
// then.
template <int kPending, int... kSizes>
__device__ __forceinline__ void wgmma_wait(float (&... sums)[kSizes]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  const auto hold = [](auto& own) {
#pragma unroll
    for (float& sum : own) asm volatile("" : "+f"(sum)::"memory");
  };
  (hold(sums), ...);
}

}  // namespace beit3_fast::cuda

#include "wgmma.cuh"

#endif

namespace beit3_fast::cuda {

// What tiles with the 128-byte swizzle are to begin at a multiple of.
constexpr int kTileAlignment = 1024;

// Operands of products in 128-byte rows, swizzled, eight rows to a block of 1024 bytes; `next`:
// bytes from 64 columns to the next 64 where the rows lie along K.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t begin, uint32_t next) {
  constexpr uint64_t kSwizzle128 = 1;
  constexpr uint64_t kBlockBytes = 1024;
  return static_cast<uint64_t>((begin & 0x3ffff) >> 4) | static_cast<uint64_t>(next >> 4) << 16 |
         kBlockBytes >> 4 << 32 | kSwizzle128 << 62;
}

// Rows along M or N, 16 columns of K from `begin` on.
__device__ __forceinline__ uint64_t descriptor_k_major(uint32_t begin) {
  return matrix_descriptor(begin, 16);
}

// Rows along K, 16 of them from `begin` on.
__device__ __forceinline__ uint64_t descriptor_mn_major(uint32_t begin, uint32_t next) {
  return matrix_descriptor(begin, next);
}

}  // namespace beit3_fast::cuda
