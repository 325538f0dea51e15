// The two products of attention on tensor cores: a warp group's 64 queries with keys, and their
// weights with values.
#pragma once

#include "attention_softmax.cuh"
#include "hopper.cuh"

namespace beit3_fast::cuda {

// Begins scores = q k^T for the first kKeys of a tile of kSlots keys. Both tiles are K-major: 16
// columns of a part are 32 bytes further.
template <class T, int kHeadDim, int kKeys, int kSlots>
__device__ void begin_scores(float (&scores)[kKeys / 2], uint32_t q, uint32_t k) {
#pragma unroll
  for (int column = 0; column < HeadShape<kHeadDim>::kColumns; column += 16) {
    const int part = column / kPartColumns;
    const int inside = column % kPartColumns * 2;
    wgmma<T, kKeys>(scores, descriptor_k_major(q + part * kQueries * kRowBytes + inside),
                    descriptor_k_major(k + part * kSlots * kRowBytes + inside), column > 0);
  }
}

// Begins sums = weights v, or adds to the sums. The tile of kSlots keys is transposed by the tensor
// cores: 16 keys are 16 rows further, the next 64 columns are in the next part.
template <class T, int kHeadDim, int kKeys, int kSlots>
__device__ void begin_sums(float (&sums)[HeadShape<kHeadDim>::kColumns / 2],
                           const Weights<T, kKeys>& weights, uint32_t v, bool add) {
#pragma unroll
  for (int step = 0; step < Weights<T, kKeys>::kSteps; ++step) {
    wgmma_transposed<T, HeadShape<kHeadDim>::kColumns>(
        sums, weights.words[step],
        descriptor_mn_major(v + step * 16 * kRowBytes, kSlots * kRowBytes), add || step > 0);
  }
}

}  // namespace beit3_fast::cuda
