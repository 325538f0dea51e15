// Rows, and their means and variances: of rows that lie in memory, and of rows that are being
// written, from sums that grow with the columns. Both ways give the same bits.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace {

using beit3_fast::cpu::kPanel;
using beit3_fast::cpu::RowStatistics;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
inline Vec load_some(const T* p, int64_t left) {
  return left >= 16 ? v_load(p) : left > 0 ? v_load_n(p, left) : v_zero();
}
template <class T>
inline void store_some(T* p, Vec a, int64_t left) {
  if (left >= 16) {
    v_store(p, a);
  } else {
    v_store_n(p, a, left);
  }
}

// A row of elements that lie in strips, and element i of a row in either form; up to the next
// multiple of kStrip the others lie behind it.
template <class T>
struct StripRow {
  const T* data;
  int64_t strip;
};
template <class T>
inline const T* at(const T* row, int64_t i) {
  return row + i;
}
template <class T>
inline const T* at(const StripRow<T>& row, int64_t i) {
  constexpr uint64_t width = beit3_fast::cpu::kStrip;
  const auto place = static_cast<uint64_t>(i);
  return row.data + static_cast<int64_t>(place / width) * row.strip + place % width;
}

// Where column `column` of a row in strips lies behind its first one.
inline int64_t place_of(int64_t column, int64_t strip) {
  constexpr int64_t width = beit3_fast::cpu::kStrip;
  return column / width * strip + column % width;
}

// An Arch's Sums: add() takes a panel of columns of a row, of which `left` are there, in ascending
// order from column 0 on; load() and store() keep kWords floats between them; end() gives the
// statistics of n columns, with a negative variance if they would be inexact.
//
// These are the mean of the numbers in each lane and the sum of their squared deviations from it,
// of two numbers a panel merged with those before (Chan, Golub and LeVeque 1983): neither a mean
// far above the deviation nor a first number far from the others costs digits.
struct LaneSums {
  static constexpr int64_t kWords = 32;
  Vec mean, square;

  void load(const float* words) {
    mean = v_load(words);
    square = v_load(words + 16);
  }
  void store(float* words) const {
    v_store(words, mean);
    v_store(words + 16, square);
  }

  template <class T>
  void add(const T* x, int64_t column, int64_t left) {
    if (left >= kPanel) {
      add_pairs(v_load(x), v_load(x + 16), column);
      return;
    }
    begin(column);
    add_some(load_some(x, left), left, column / 16);
    if (left > 16) add_some(load_some(x + 16, left - 16), left - 16, column / 16 + 1);
  }

  // Stores the columns of a panel and adds up what is stored.
  template <class T>
  void put(T* x, const Vec* y, int64_t column) {
    v_store(x, y[0]);
    v_store(x + 16, y[1]);
    add(x, column, kPanel);
  }

  // Out of line, so that a compiler joins products and sums in one way only, whoever calls.
  __attribute__((noinline)) static RowStatistics end(const LaneSums& s, int64_t n) {
    const float total = static_cast<float>(n);
    // Of whole vectors, and of the lanes of the last one.
    const Vec count = v_add(v_set(static_cast<float>(n / 16)), v_keep(v_set(1.0f), n % 16, 0.0f));
    const float centre = v_sum(v_mul(count, s.mean)) / total;
    // The rounding of the centre is measured as well.
    const Vec d = v_sub(s.mean, v_set(centre)), weighted = v_mul(count, d);
    const float offset = v_sum(weighted) / total;
    const float variance = v_sum(v_fma(weighted, d, s.square)) / total - offset * offset;
    return {centre, offset, variance < 0.0f ? 0.0f : variance};
  }

 private:
  void begin(int64_t column) {
    if (column == 0) mean = square = v_zero();
  }

  void add_pairs(Vec a, Vec b, int64_t column) {
    begin(column);
    const auto before = static_cast<float>(column / kPanel);  // pairs
    const float share = 0.5f / (before + 1.0f);
    const Vec apart = v_sub(a, b), d = v_fma(v_set(-2.0f), mean, v_add(a, b));
    mean = v_fma(d, v_set(share), mean);
    square = v_fma(v_mul(apart, v_set(0.5f)), apart, square);
    square = v_fma(v_mul(d, v_set(before * share)), d, square);
  }

  // One number in each of the first `left` lanes, which have had `before` of them.
  void add_some(Vec x, int64_t left, int64_t before) {
    Vec d = v_sub(x, mean);
    if (left < 16) d = v_keep(d, left, 0.0f);
    const float share = 1.0f / static_cast<float>(before + 1);
    mean = v_fma(d, v_set(share), mean);
    square = v_fma(v_mul(d, v_set(static_cast<float>(before) * share)), d, square);
  }
};

// Statistics of R rows of n numbers, side by side: one row is a chain of additions that wait for
// each other.
template <class Sums, int R, class Row>
inline void sum_up(const Row* x, int64_t n, RowStatistics* out) {
  Sums sums[R];
  for (int r = 0; r < R; ++r) sums[r].add(at(x[r], 0), 0, n);
  int64_t i = kPanel;
  for (; i + kPanel <= n; i += kPanel) {
    for (int r = 0; r < R; ++r) sums[r].add(at(x[r], i), i, kPanel);
  }
  for (int r = 0; i < n && r < R; ++r) sums[r].add(at(x[r], i), i, n - i);
  for (int r = 0; r < R; ++r) out[r] = Sums::end(sums[r], n);
}
template <class Arch, int R, class Row>
inline void measure(const Row* x, int64_t n, RowStatistics* out) {
  sum_up<typename Arch::Sums, R>(x, n, out);
  for (int r = 0; r < R; ++r) {
    if (out[r].variance < 0.0f) sum_up<LaneSums, 1>(x + r, n, out + r);
  }
}
template <class Arch, class Row>
inline RowStatistics measure(const Row& x, int64_t n) {
  RowStatistics out;
  measure<Arch, 1>(&x, n, &out);
  return out;
}
// The same of `count` rows, row(i).
template <class Arch, class Row>
inline void measure_rows(const Row& row, int64_t count, int64_t n, RowStatistics* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) {
    const decltype(row(r)) rows[] = {row(r), row(r + 1), row(r + 2), row(r + 3)};
    measure<Arch, 4>(rows, n, out + r);
  }
  for (; r < count; ++r) out[r] = measure<Arch>(row(r), n);
}
// The same of a row from the sums of its columns, which are in `words`.
template <class Arch, class Row>
inline RowStatistics measured(const float* words, const Row& x, int64_t n) {
  typename Arch::Sums sums;
  sums.load(words);
  const RowStatistics quick = Arch::Sums::end(sums, n);
  if (!(quick.variance < 0.0f)) return quick;
  RowStatistics out;
  sum_up<LaneSums, 1>(&x, n, &out);
  return out;
}

// Mean and reciprocal standard deviation of a row as (pivot, shift, scale):
// (x - mean) / sqrt(var + eps) = (x - pivot) * scale + shift.
struct Norm {
  float pivot;
  float shift;
  float scale;
};

// NaN where fp32 does not hold n times the variance, as of numbers of 1e20: 0 would make zeros of
// them.
inline Norm norm_of(const RowStatistics& row, float eps) {
  const float beyond = row.variance * 0.0f;
  const float scale = 1.0f / __builtin_sqrtf(row.variance + eps) + beyond;
  return {row.centre, -row.offset * scale, scale};
}

}  // namespace
