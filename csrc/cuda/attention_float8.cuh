// Rows of attention in 8 bits, as the product behind it reads them. The scale of 128 columns needs
// no other head's numbers: it is that of the sample's values, which are no smaller.
#pragma once

#include <type_traits>

#include "attention_softmax.cuh"
#include "float8_scale.cuh"

namespace beit3_fast::cuda {

// Scales of a head's columns, found by a warp together. Does nothing where no 8 bits are wanted.
template <int kHeadDim>
class HeadScales {
  static constexpr int kBlock = SharedAttention::kBlock;
  // How many blocks of columns a head may have a part of.
  static constexpr int kParts = kBlock % kHeadDim == 0 ? 1 : 2;

  const SharedAttention& op;
  const int first_column;
  uint32_t bits[kParts];

 public:
  __device__ HeadScales(const SharedAttention& op, const Head& head)
      : op(op), first_column(head.index * kHeadDim) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) bits[part] = Float8Scale::kLowestBits;
    if (op.rounded == nullptr) return;
    for (int place = lane_index(); place < head.keys.count(); place += 32) {
      const float* scales = op.v_scales + head.keys.row(place) * op.v_scales_stride;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        bits[part] = max(bits[part], bits_of_float(scales[block(part)]));
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      for (int mask = 16; mask > 0; mask /= 2) {
        bits[part] = max(bits[part], shuffle_xor(bits[part], mask));
      }
    }
  }

  // Eight columns of the head from `column` on, a multiple of 8, in 16 bits and two a word.
  __device__ void store(int64_t row, int column, const uint32_t (&words)[4]) const {
    if (op.rounded == nullptr) return;
    const int at = first_column + column;
    const uint32_t own = at / kBlock == block(0) ? bits[0] : bits[kParts - 1];
    const float inverse = Float8Scale::inverse_of(own);
    float scaled[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scaled[2 * i] = low_of<BFloat16>(words[i]) * inverse;
      scaled[2 * i + 1] = high_of<BFloat16>(words[i]) * inverse;
    }
    store_two_words(static_cast<uint8_t*>(op.rounded) + row * columns() + at,
                    pack4_e4m3(scaled[0], scaled[1], scaled[2], scaled[3]),
                    pack4_e4m3(scaled[4], scaled[5], scaled[6], scaled[7]));
  }

  // The head with the first column of a block speaks for the block.
  __device__ void store_scale(int64_t row) const {
    const int last = block(kParts - 1);
    if (op.rounded == nullptr || last * kBlock < first_column) return;
    op.rounded_scales[row * ((columns() + kBlock - 1) / kBlock) + last] =
        float_of_bits(bits[kParts - 1]);
  }

 private:
  __device__ int64_t columns() const { return op.num_heads * kHeadDim; }
  __device__ int block(int part) const {
    return (first_column + (part > 0 ? kHeadDim - 1 : 0)) / kBlock;
  }
};

// What the kernels for tensors of type T use.
template <class T, int kHeadDim>
using RoundingOf =
    std::conditional_t<std::is_same_v<T, BFloat16>, HeadScales<kHeadDim>, NoRounding>;

}  // namespace beit3_fast::cuda
