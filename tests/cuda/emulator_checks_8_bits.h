// What the emulator must compute of 8-bit numbers.
#pragma once

#include <stdexcept>

#include "portable.cuh"

namespace beit3_fast::emulator_checks {

using namespace beit3_fast::cuda;

inline void expect(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

inline void rounding_to_8_bits() {
  for (int i = 0; i < 256; ++i) {
    const float number = E4M3::number(static_cast<uint16_t>(i));
    expect(number != number || emulated::e4m3_bits(number) == i, "a number does not survive");
  }
  const auto rounded = [](float value) { return E4M3::number(emulated::e4m3_bits(value)); };
  expect(rounded(17.0f) == 16.0f && rounded(19.0f) == 20.0f, "halves to even");
  expect(rounded(0x1p-10f) == 0.0f && rounded(0x1.8p-9f) == 0x1p-8f, "below normal numbers");
  expect(rounded(0x1.fp-7f) == 0x1p-6f, "the smallest normal number");
  expect(rounded(1e9f) == 448.0f && rounded(-INFINITY) == -448.0f, "the largest number");
  expect(rounded(NAN) != rounded(NAN), "NaN");
}

inline uint32_t four(float first, float second, float third, float fourth) {
  return pack2<E4M3>(first, second) | pack2<E4M3>(third, fourth) << 16;
}

// Four numbers from k on of a row of a, and of a column of b.
inline float left(int row, int k) { return static_cast<float>((3 * row + 5 * k) % 8); }
inline float right(int k, int column) { return static_cast<float>((7 * k + 2 * column) % 8); }

inline void products_of_8_bits() {
  emulated::run({1, 32, 16, emulated::Order::kEager, 0}, [] {
    const int group = lane_index() / 4, k = lane_index() % 4 * 4;
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, from = k + i / 2 * 16;
      a[i] = four(left(row, from), left(row, from + 1), left(row, from + 2), left(row, from + 3));
    }
    for (int i = 0; i < 2; ++i) {
      const int from = k + i * 16;
      b[i] = four(right(from, group), right(from + 1, group), right(from + 2, group),
                  right(from + 3, group));
    }
    float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    mma<E4M3>(d, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) {
      const int row = group + i / 2 * 8, column = lane_index() % 4 * 2 + i % 2;
      float sum = 1.0f;
      for (int j = 0; j < 32; ++j) sum += left(row, j) * right(j, column);
      expect(d[i] == sum, "wrong numbers");
    }
    const uint32_t tiny = four(0x1p-7f, 0x1p-7f, 0x1p-7f, 0x1p-7f);
    const uint32_t half[4] = {tiny, tiny, 0, 0};
    float one[4] = {1.0f, 1.0f, 1.0f, 1.0f}, eighth[4] = {0x1p-3f};
    mma<E4M3>(one, half, tiny, 0);
    expect(one[0] == 1.0f, "addends of 2^-14 are lost beside 1");
    mma<E4M3>(eighth, half, tiny, 0);
    expect(eighth[0] == 0x1p-3f + 0x1p-10f, "16 times 2^-14 is not, beside an eighth");
  });
}

}  // namespace beit3_fast::emulator_checks
