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

// 16 numbers of a row whose 128-byte rows lie along K.
inline void read_k_major(const Descriptor& from, int row, float (*number)(uint16_t),
                         float (&values)[16]) {
  const uint32_t begin = from.begin + row / 8 * from.stride + row % 8 * 128;
  for (int half = 0; half < 2; ++half) {
    uint16_t bits[8];
    std::memcpy(bits, chunk_of_operand(begin + 16 * half), 16);
    for (int i = 0; i < 8; ++i) values[8 * half + i] = number(bits[i]);
  }
}

// 16 numbers down a column whose 128-byte rows lie along N.
inline void read_mn_major(const Descriptor& from, int column, float (*number)(uint16_t),
                          float (&values)[16]) {
  const uint32_t begin = from.begin + column / 64 * from.leading;
  for (int k = 0; k < 16; ++k) {
    const uint32_t address = begin + k / 8 * from.stride + k % 8 * 128 + column % 64 * 2;
    uint16_t bits;
    std::memcpy(&bits, chunk_of_operand(address) + address % 16, 2);
    values[k] = number(bits);
  }
}

// The thread's two rows of a left operand that lies in registers.
inline void read_words(const uint32_t* words, float (*number)(uint16_t), float (&rows)[2][16]) {
  const LaneValue own{words[0], words[1], words[2], words[3]};
  const LaneValue* all = meet_lanes("a product's operand", own);
  const int first = block->current % 32 / 4 * 4;
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 2; ++row) {
      const uint32_t word = all[first + k % 8 / 2][k / 8 * 2 + row];
      rows[row][k] = number(static_cast<uint16_t>(k % 2 ? word >> 16 : word));
    }
  }
}

inline float dot(const float (&a)[16], const float (&b)[16]) {
  float sum = 0.0f;
  for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
  return sum;
}

inline void carry_out(const Product& product, float* sums) {
  const int row = block->current % 128 / 32 * 16 + block->current % 32 / 4;
  float a[2][16];
  if (product.a_words != nullptr) {
    read_words(product.a_words, product.number, a);
  } else {
    read_k_major(Descriptor(product.a), row, product.number, a[0]);
    read_k_major(Descriptor(product.a), row + 8, product.number, a[1]);
  }
  const Descriptor right(product.b);
  for (int i = 0; i < product.columns / 4; ++i) {
    const int column = i / 2 * 8 + block->current % 4 * 2 + i % 2;
    float b[16];
    (product.transposed ? read_mn_major : read_k_major)(right, column, product.number, b);
    for (int half = 0; half < 2; ++half) {
      float& sum = sums[i / 2 * 4 + half * 2 + i % 2];
      sum = (product.add ? sum : 0.0f) + dot(a[half], b);
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
                             float (*number)(uint16_t)) {
  float rows[2][16];
  read_words(a, number, rows);
  const LaneValue* all = meet_lanes("mma", {b0, b1});
  for (int j = 0; j < 2; ++j) {
    float b[16];
    const int column = block->current % 4 * 2 + j;
    for (int k = 0; k < 16; ++k) {
      const uint32_t word = all[column * 4 + k % 8 / 2][k / 8];
      b[k] = number(static_cast<uint16_t>(k % 2 ? word >> 16 : word));
    }
    d[j] += dot(rows[0], b);
    d[2 + j] += dot(rows[1], b);
  }
}

}  // namespace beit3_fast::emulated
