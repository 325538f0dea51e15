// Products of warps and warp groups on the CPU: every thread computes what lands in its own
// registers.
#pragma once

#include "emulated_units.h"

namespace beit3_fast::emulated {

struct Descriptor {
  uint32_t begin;
  uint32_t leading;
  uint32_t stride;

  explicit Descriptor(uint64_t bits)
      : begin((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4) {
    check(bits >> 62 == 1, "a descriptor without the 128-byte swizzle");
    check((bits >> 49 & 7) == 0, "a descriptor with a base offset");
  }
};

inline const uint8_t* chunk_of_operand(uint32_t address) {
  const uint32_t place = swizzled(address) & ~15u;
  const uint8_t* chunk = block->at(place, 16);
  check(!block->unfenced[(place - kSharedBase) / 16],
        "a product reads what a thread wrote without a fence");
  return chunk;
}

// Along K, a product takes 32 bytes of each operand.
constexpr int kDepthBytes = 32;
using Depth = float[kDepthBytes];

// 32 bytes of a row whose 128-byte rows lie along K.
inline void read_k_major(const Descriptor& from, int row, const Format& format, Depth& values) {
  const uint32_t begin = from.begin + row / 8 * from.stride + row % 8 * 128;
  const int each = format.in(16);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* chunk = chunk_of_operand(begin + 16 * half);
    for (int i = 0; i < each; ++i) {
      uint16_t bits = 0;
      std::memcpy(&bits, chunk + i * format.bytes, static_cast<size_t>(format.bytes));
      values[each * half + i] = format.number(bits);
    }
  }
}

// 16 numbers down a column whose 128-byte rows lie along N.
inline void read_mn_major(const Descriptor& from, int column, const Format& format, Depth& values) {
  check(format.bytes == 2, "8-bit operands lie along K");
  const uint32_t begin = from.begin + column / 64 * from.leading;
  for (int k = 0; k < 16; ++k) {
    const uint32_t address = begin + k / 8 * from.stride + k % 8 * 128 + column % 64 * 2;
    uint16_t bits;
    std::memcpy(&bits, chunk_of_operand(address) + address % 16, 2);
    values[k] = format.number(bits);
  }
}

// The number at k of what four neighbours hold: words 0 and 1, or 0 and 2, of each in turn.
inline float number_in_words(const LaneValue* all, int first, int k, int stride, int begin,
                             const Format& format) {
  const int in_word = format.in(4);
  const int word = k / in_word;
  const uint32_t bits =
      all[first + word % 4][word / 4 * stride + begin] >> (k % in_word * 8 * format.bytes);
  return format.number(static_cast<uint16_t>(format.bytes == 2 ? bits & 0xffff : bits & 0xff));
}

// The thread's two rows of a left operand that lies in registers.
inline void read_words(const uint32_t* words, const Format& format, Depth (&rows)[2]) {
  const LaneValue own{words[0], words[1], words[2], words[3]};
  const LaneValue* all = meet_lanes("a product's operand", own);
  const int first = block->current % 32 / 4 * 4;
  for (int k = 0; k < format.in(kDepthBytes); ++k) {
    for (int row = 0; row < 2; ++row) {
      rows[row][k] = number_in_words(all, first, k, 2, row, format);
    }
  }
}

// Sums of 8-bit products: of each addend, the bits from the highest of all 14 places down.
inline float add_aligned(float sum, const Depth& a, const Depth& b) {
  float highest = std::fabs(sum), plain = sum;
  for (int k = 0; k < kDepthBytes; ++k) {
    highest = std::fmax(highest, std::fabs(a[k] * b[k]));
    plain += a[k] * b[k];
  }
  if (highest == 0.0f || !std::isfinite(plain)) return plain;
  const float unit = float_of((bits_of(highest) & 0x7f800000u) - (13u << 23));
  const float each = 1.0f / unit;
  auto units = static_cast<int>(sum * each);
  for (int k = 0; k < kDepthBytes; ++k) units += static_cast<int>(a[k] * b[k] * each);
  return static_cast<float>(units) * unit;
}

inline float add_products(float sum, const Depth& a, const Depth& b, const Format& format) {
  if (format.bytes == 1) return add_aligned(sum, a, b);
  float dot = 0.0f;
  for (int k = 0; k < format.in(kDepthBytes); ++k) dot += a[k] * b[k];
  return sum + dot;
}

inline void carry_out(const Product& product, float* sums) {
  const int row = block->current % 128 / 32 * 16 + block->current % 32 / 4;
  Depth a[2];
  if (product.a_words != nullptr) {
    read_words(product.a_words, product.format, a);
  } else {
    read_k_major(Descriptor(product.a), row, product.format, a[0]);
    read_k_major(Descriptor(product.a), row + 8, product.format, a[1]);
  }
  const Descriptor right(product.b);
  for (int i = 0; i < product.columns / 4; ++i) {
    const int column = i / 2 * 8 + block->current % 4 * 2 + i % 2;
    Depth b;
    (product.transposed ? read_mn_major : read_k_major)(right, column, product.format, b);
    for (int half = 0; half < 2; ++half) {
      float& sum = sums[i / 2 * 4 + half * 2 + i % 2];
      sum = add_products(product.add ? sum : 0.0f, a[half], b, product.format);
    }
  }
}

// All threads of a warp group must issue the same products in the same order. The sums are NaN
// until they were waited for, and the operands are read no earlier than that.
inline void begin_product(Product product) {
  Thread& thread = block->self();
  check(thread.fenced, "a product without wgmma.fence since the last wait");
  auto& issued = block->issued[block->current / 128];
  const auto key = std::make_tuple(product.a, product.b, product.columns, product.add);
  if (thread.issued == issued.size()) issued.push_back(key);
  check(issued[thread.issued++] == key, "threads of a warp group issue different products");
  const auto [shadow, fresh] = thread.shadows.try_emplace(product.sums);
  if (fresh) {
    shadow->second.assign(product.sums, product.sums + product.columns / 2);
    std::fill_n(product.sums, product.columns / 2, NAN);
  }
  check(shadow->second.size() == static_cast<size_t>(product.columns / 2),
        "products of two sizes share sums");
  product.group = thread.groups;
  thread.products.push_back(product);
}

inline void wait_for_products(int pending) {
  Thread& thread = block->self();
  size_t done = 0;
  while (done < thread.products.size() && thread.products[done].group < thread.groups - pending) {
    const Product& product = thread.products[done++];
    carry_out(product, thread.shadows.at(product.sums).data());
  }
  thread.products.erase(thread.products.begin(),
                        thread.products.begin() + static_cast<ptrdiff_t>(done));
  std::set<float*> under_way;
  for (const Product& product : thread.products) under_way.insert(product.sums);
  for (auto shadow = thread.shadows.begin(); shadow != thread.shadows.end();) {
    if (under_way.count(shadow->first)) {
      ++shadow;
      continue;
    }
    std::copy(shadow->second.begin(), shadow->second.end(), shadow->first);
    shadow = thread.shadows.erase(shadow);
  }
  thread.fenced = false;
  meet_lanes("wgmma.wait_group", {});
}

inline void read_matrices(uint32_t (&words)[4], uint32_t row, bool transposed) {
  check(row % 16 == 0, "ldmatrix of a row at no multiple of 16 bytes");
  const LaneValue* rows = meet_lanes("ldmatrix", {row});
  const int lane = block->current % 32;
  for (int i = 0; i < 4; ++i) {
    uint16_t two[2];
    for (int j = 0; j < 2; ++j) {
      const int from = transposed ? lane % 4 * 2 + j : lane / 4;
      const int column = transposed ? lane / 4 : lane % 4 * 2 + j;
      std::memcpy(&two[j], block->at(rows[8 * i + from][0], 16) + 2 * column, 2);
    }
    words[i] = two[0] | static_cast<uint32_t>(two[1]) << 16;
  }
}

inline void multiply_in_warp(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             const Format& format) {
  Depth rows[2];
  read_words(a, format, rows);
  const LaneValue* all = meet_lanes("mma", {b0, b1});
  for (int j = 0; j < 2; ++j) {
    Depth b;
    const int column = block->current % 4 * 2 + j;
    for (int k = 0; k < format.in(kDepthBytes); ++k) {
      b[k] = number_in_words(all, column * 4, k, 1, 0, format);
    }
    d[j] = add_products(d[j], rows[0], b, format);
    d[2 + j] = add_products(d[2 + j], rows[1], b, format);
  }
}

}  // namespace beit3_fast::emulated
