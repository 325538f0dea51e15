// Sixteen fp32 lanes in plain C++ for any platform: the same functions as vec_avx512.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Vec {
  float lane[16];
};

template <class F>
inline Vec v_map(F f) {
  Vec out;
  for (int i = 0; i < 16; ++i) out.lane[i] = f(i);
  return out;
}

inline Vec v_set(float x) {
  return v_map([&](int) { return x; });
}
inline Vec v_zero() { return v_set(0.0f); }
inline Vec v_add(const Vec& a, const Vec& b) {
  return v_map([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec v_sub(const Vec& a, const Vec& b) {
  return v_map([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec v_mul(const Vec& a, const Vec& b) {
  return v_map([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec v_fma(const Vec& a, const Vec& b, const Vec& c) {
  return v_map([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Vec v_max(const Vec& a, const Vec& b) {
  return v_map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline float v_sum(const Vec& a) {
  Vec s = a;
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) s.lane[i] += s.lane[i + width];
  }
  return s.lane[0];
}
inline float v_top(const Vec& a) {
  float top = a.lane[0];
  for (int i = 1; i < 16; ++i) top = a.lane[i] > top ? a.lane[i] : top;
  return top;
}
inline Vec v_keep(const Vec& a, int64_t n, float fill) {
  return v_map([&](int i) { return i < n ? a.lane[i] : fill; });
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) { return bf16_to_float(x); }
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, uint16_t* out) { *out = float_to_bf16(x); }

template <class T>
inline Vec v_load(const T* p) {
  return v_map([&](int i) { return to_float(p[i]); });
}
template <class T>
inline Vec v_load_n(const T* p, int64_t n) {
  return v_map([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
template <class T>
inline void v_store(T* p, const Vec& a) {
  for (int i = 0; i < 16; ++i) from_float(a.lane[i], p + i);
}
template <class T>
inline void v_store_n(T* p, const Vec& a, int64_t n) {
  for (int i = 0; i < n; ++i) from_float(a.lane[i], p + i);
}

// Sixteen int32, less `offsets` where there are some.
inline Vec v_integers(const int32_t* p, const int32_t* offsets) {
  return v_map(
      [&](int i) { return static_cast<float>(offsets == nullptr ? p[i] : p[i] - offsets[i]); });
}

template <int Degree>
inline Vec v_exp2(const Vec& x) {
  return v_map([&](int i) { return std::exp2(x.lane[i]); });
}
template <class>
inline Vec v_gelu(const Vec& x) {
  return v_map([&](int i) {
    const float a = x.lane[i];
    return a == -INFINITY ? 0.0f : 0.5f * a * std::erfc(a * -0.70710678118654752f);
  });
}

inline uint32_t unit_at(const float* row, int64_t unit, int64_t n) {
  uint32_t word = 0;
  if (unit < n) std::memcpy(&word, row + unit, sizeof(word));
  return word;
}
inline uint32_t unit_at(const uint16_t* row, int64_t unit, int64_t n) {
  const uint32_t low = 2 * unit < n ? row[2 * unit] : 0u;
  const uint32_t high = 2 * unit + 1 < n ? row[2 * unit + 1] : 0u;
  return low | (high << 16);
}

template <class T>
inline void v_pack_panel(const T* const* rows, int64_t count, int64_t depth, uint32_t* panel) {
  constexpr int64_t per_unit = 4 / static_cast<int64_t>(sizeof(T));
  const int64_t units = (depth + 16 * per_unit - 1) / (16 * per_unit) * 16;
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t column = 0; column < 32; ++column) {
      panel[unit * 32 + column] = column < count ? unit_at(rows[column], unit, depth) : 0u;
    }
  }
}

inline void v_pack_rows(const float* a, const float*, int64_t from, int64_t n, uint32_t* words) {
  for (int64_t j = 0; j < 32; ++j) words[j] = a == nullptr ? 0u : unit_at(a, from + j, n);
}
inline void v_pack_rows(const uint16_t* a, const uint16_t* b, int64_t from, int64_t n,
                        uint32_t* words) {
  for (int64_t j = 0; j < 32; ++j) {
    const bool inside = from + j < n;
    const uint32_t low = a != nullptr && inside ? a[from + j] : 0u;
    const uint32_t high = b != nullptr && inside ? b[from + j] : 0u;
    words[j] = low | (high << 16);
  }
}

}  // namespace
