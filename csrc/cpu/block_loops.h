// The functions of one instruction-set level. Included once by each kernels_*.cpp, after the header
// that defines Vec and its functions.
#pragma once

#include "attention_loops.h"
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
constexpr Kernels make_kernels(const char* isa) {
  return {isa,
          linear_scratch<Arch>,
          linear_block<Arch>,
          attention_scratch<Arch>,
          attention_block<Arch>,
          product_loop<Arch>,
          pack_panel<Arch>};
}

template <class Arch>
constexpr Kernels make_int8_kernels(const char* isa) {
  return {isa,    linear_scratch<Arch>, linear_block<Arch>, nullptr, nullptr, product_loop<Arch>,
          nullptr};
}

}  // namespace
