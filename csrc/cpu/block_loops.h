// The functions of one instruction-set level. Included once by each kernels_*.cpp, after the header
// that defines Vec and its functions.
#pragma once

#include "attention_gradients_loops.h"
#include "likeliest_loops.h"
#include "linear_loops.h"

namespace {

template <class Arch>
void pack_panel(const void* const* rows, int64_t count, int64_t depth, uint32_t* panel) {
  const typename Arch::T* typed[kPanel];
  for (int64_t j = 0; j < kPanel; ++j) {
    typed[j] = j < count ? static_cast<const typename Arch::T*>(rows[j]) : nullptr;
  }
  v_pack_panel(typed, count, depth, panel);
}

template <class Arch>
void pack_transposed(const void* x, int64_t stride, int64_t depth, int64_t columns, int64_t from,
                     uint32_t* panel) {
  using T = typename Arch::T;
  // Rows lie too far apart for the hardware to foresee.
  constexpr int64_t ahead = 16;
  const auto row = [&](int64_t k) -> const T* {
    return k < depth ? static_cast<const T*>(x) + k * stride : nullptr;
  };
  const int64_t units = chunks_of<Arch>(depth) * kChunk;
  for (int64_t unit = 0; unit < units; ++unit, panel += kPanel) {
    const int64_t k = unit * Arch::kPerUnit;
    if (k + ahead < depth) __builtin_prefetch(row(k + ahead) + from, 0);
    v_pack_rows(row(k), row(k + 1), from, columns, panel);
  }
}

template <class Arch>
void layer_norm(const NormBlock& block) {
  using T = typename Arch::T;
  for (int64_t r = 0; r < block.count; ++r) {
    const T* const x = static_cast<const T*>(block.x) + r * block.x_stride;
    T* const out = static_cast<T*>(block.out) + r * block.out_stride;
    const Norm norm = measure<Arch>(x, block.width, block.eps);
    for (int64_t i = 0; i < block.width; i += 16) {
      const Vec y = normal_values(x + i, i, block.width, norm, block.weight, block.bias);
      store_some(out + i, y, block.width - i);
    }
  }
}

inline int64_t most_rows(int64_t) { return beit3_fast::cpu::kBlockRows; }

struct TileLinear {
  template <class Arch>
  static constexpr LinearKernels of() {
    return {most_rows, Arch::kTileRows, false, linear_scratch<Arch>, linear_block<Arch>};
  }
};

template <class Arch, class Linear = TileLinear>
constexpr Kernels make_int8_kernels(const char* isa) {
  Kernels own{};
  own.isa = isa;
  own.linear = Linear::template of<Arch>();
  own.product_scratch = linear_scratch<Arch>;
  own.product_loop = product_loop<Arch>;
  return own;
}

template <class Arch, class Linear = TileLinear>
constexpr Kernels make_kernels(const char* isa) {
  Kernels own = make_int8_kernels<Arch, Linear>(isa);
  own.attention_scratch = attention_scratch<Arch>;
  own.attention_block = attention_block<Arch>;
  own.gradients_scratch = gradients_scratch<Arch>;
  own.gradients_block = gradients_block<Arch>;
  own.pack_panel = pack_panel<Arch>;
  own.pack_transposed = pack_transposed<Arch>;
  own.likeliest = likeliest<Arch>;
  own.layer_norm = layer_norm<Arch>;
  return own;
}

}  // namespace
