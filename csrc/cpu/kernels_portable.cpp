// Plain C++ for any platform.
#include "kernels.h"
#include "vec_portable.h"
//
#include "block_loops.h"

namespace {

template <class Element>
struct Portable : OfTiles<Portable<Element>> {
  using T = Element;
  static constexpr int kPerUnit = 4 / static_cast<int>(sizeof(Element));
  static constexpr int kRowWords = 16 * kPerUnit;  // always fp32
  static constexpr int kTileRows = 12;
  static constexpr int64_t kDepthUnits = 512 / kPerUnit;
  static constexpr int kExpDegree = 6;

  using Sums = LaneSums;

  static void put(uint32_t* a, const Vec* part) { put_sum(a, part, v_zero()); }
  static void copy(uint32_t* a, const T* x, int64_t left) {
    for (int j = 0; j < kPerUnit; ++j) {
      const Vec values = load_some(x + 16 * j, left - 16 * j);
      std::memcpy(a + 16 * j, values.lane, sizeof(values.lane));
    }
  }
  static Vec put_sum(uint32_t* a, const Vec* part, Vec sum) {
    for (int j = 0; j < kPerUnit; ++j) {
      Vec rounded;
      for (int i = 0; i < 16; ++i) {
        T stored;
        from_float(part[j].lane[i], &stored);
        rounded.lane[i] = to_float(stored);
      }
      std::memcpy(a + 16 * j, rounded.lane, sizeof(rounded.lane));
      sum = v_add(sum, rounded);
    }
    return sum;
  }

  template <int M, int V>
  static void tile(const uint32_t* a, const uint32_t* b, int64_t panel_words, int64_t units,
                   float* c, int64_t c_stride, bool more, Ahead) {
    constexpr int kWidth = V == 1 ? 16 : 32;
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < 16 * V / kWidth; ++j) {
        row<kWidth>(a + i * kRowWords, M * kRowWords, b + j * panel_words, units,
                    c + i * c_stride + j * kWidth, more);
      }
    }
  }

  template <int Width>
  static void row(const uint32_t* a, int64_t chunk_words, const uint32_t* b, int64_t units,
                  float* c, bool more) {
    // By chunks, for the reason given at the fp32 tile of kernels_avx512.cpp.
    float total[Width] = {};
    if (more) std::memcpy(total, c, sizeof(total));
    for (; units > 0; units -= kChunk, a += chunk_words) {
      float sum[Width] = {};
      float left[kRowWords];
      std::memcpy(left, a, sizeof(left));
      for (int64_t k = 0; k < min_of(units, kChunk); ++k, b += kPanel) {
        for (int j = 0; j < Width; ++j) {
          if (kPerUnit == 1) {
            float right;
            std::memcpy(&right, b + j, sizeof(right));
            sum[j] += left[k] * right;
          } else {
            const uint32_t low = b[j] << 16, high = b[j] & 0xffff0000u;
            float even, odd;
            std::memcpy(&even, &low, sizeof(even));
            std::memcpy(&odd, &high, sizeof(odd));
            sum[j] += left[2 * k] * even;
            sum[j] += left[2 * k + 1] * odd;
          }
        }
      }
      for (int j = 0; j < Width; ++j) total[j] += sum[j];
    }
    std::memcpy(c, total, sizeof(total));
  }
};

constexpr Kernels kFloat32 = make_kernels<Portable<float>>("portable");
constexpr Kernels kBFloat16 = make_kernels<Portable<uint16_t>>("portable");

}  // namespace

const beit3_fast::cpu::Kernels* beit3_fast::cpu::portable_kernels(DType dtype) {
  return dtype == DType::kFloat32 ? &::kFloat32 : &::kBFloat16;
}
