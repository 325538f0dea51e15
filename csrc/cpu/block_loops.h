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
void row_statistics(const StatisticsBlock& block) {
  using T = typename Arch::T;
  const auto row = [&](int64_t r) {
    return StripRow<T>{static_cast<const T*>(block.x) + r * block.x_stride, block.x_strip};
  };
  measure_rows<Arch>(row, block.count, block.width, block.out);
}

template <class Arch>
void layer_norm(const NormBlock& block) {
  using T = typename Arch::T;
  for (int64_t r = 0; r < block.count; ++r) {
    const T* const x = static_cast<const T*>(block.x) + r * block.x_stride;
    T* const out = static_cast<T*>(block.out) + r * block.out_stride;
    const Norm norm = norm_of(measure<Arch>(x, block.width), block.eps);
    for (int64_t i = 0; i < block.width; i += 16) {
      const Vec y = normal_values(x + i, i, block.width, norm, block.weight, block.bias);
      store_some(out + i, y, block.width - i);
    }
  }
}

// With d = sqrt(var + eps), n = (x - mean) / d and g = grad * weight: (g - mean(g) - n mean(g n)) /
// d, and the sums of grad * n and of grad.
template <class Arch>
void layer_norm_gradients(const NormGradientsBlock& block) {
  using T = typename Arch::T;
  const int64_t width = block.width;
  for (int64_t i = 0; i < width; i += 16) {
    v_store(block.weight_grad + i, v_zero());
    v_store(block.bias_grad + i, v_zero());
  }
  const float share = 1.0f / static_cast<float>(width);
  for (int64_t r = 0; r < block.count; ++r) {
    const T* const x = static_cast<const T*>(block.x) + r * block.x_stride;
    const T* const grad = static_cast<const T*>(block.grad) + r * block.grad_stride;
    T* const out = static_cast<T*>(block.x_grad) + r * block.x_grad_stride;
    const Norm norm = norm_of(measure<Arch>(x, width), block.eps);
    Vec sum = v_zero(), met = v_zero();
    for (int64_t i = 0; i < width; i += 16) {
      const Vec n = centred(load_some(x + i, width - i), norm);
      const Vec own = load_some(grad + i, width - i);
      v_store(block.weight_grad + i, v_fma(own, n, v_load(block.weight_grad + i)));
      v_store(block.bias_grad + i, v_add(own, v_load(block.bias_grad + i)));
      const Vec g = v_mul(own, v_load(block.weight + i));
      sum = v_add(sum, g);
      met = v_fma(g, n, met);
    }
    const Vec mean = v_set(v_sum(sum) * share), slope = v_set(v_sum(met) * -share);
    const Vec scale = v_set(norm.scale);
    for (int64_t i = 0; i < width; i += 16) {
      const Vec n = centred(load_some(x + i, width - i), norm);
      const Vec g = v_mul(load_some(grad + i, width - i), v_load(block.weight + i));
      store_some(out + i, v_mul(v_fma(n, slope, v_sub(g, mean)), scale), width - i);
    }
  }
}

template <class Arch>
void transpose(const void* x, int64_t stride, int64_t rows, int64_t columns, int64_t from,
               void* out, int64_t out_stride) {
  using T = typename Arch::T;
  // Pairs of bf16, or fp32, as units of a panel; those of a square of units change places.
  constexpr int64_t side = kPanel * Arch::kPerUnit;
  const int64_t width = min_of(kPanel, columns - from);
  alignas(kCacheLine) uint32_t units[kPanel * kPanel], turned[kPanel * kPanel];
  const float* lines[kPanel];
  for (int64_t i = 0; i < kPanel; ++i) {
    lines[i] = reinterpret_cast<const float*>(units) + i * kPanel;
  }
  for (int64_t first = 0; first < rows; first += side) {
    const int64_t count = min_of(side, rows - first);
    const auto row = [&](int64_t k) -> const T* {
      return k < count ? static_cast<const T*>(x) + (first + k) * stride : nullptr;
    };
    for (int64_t unit = 0; unit < ceil_div(count, Arch::kPerUnit); ++unit) {
      const int64_t k = unit * Arch::kPerUnit;
      v_pack_rows(row(k), row(k + 1), from, columns, units + unit * kPanel);
    }
    v_pack_panel(lines, ceil_div(count, Arch::kPerUnit), kPanel, turned);
    for (int64_t j = 0; j < width; ++j) {
      __builtin_memcpy(static_cast<T*>(out) + (from + j) * out_stride + first, turned + j * kPanel,
                       static_cast<uint64_t>(count) * sizeof(T));
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
  own.row_statistics = row_statistics<Arch>;
  own.layer_norm = layer_norm<Arch>;
  own.layer_norm_gradients = layer_norm_gradients<Arch>;
  own.transpose = transpose<Arch>;
  return own;
}

}  // namespace
