// int8 weights in plain C++ for any platform.
#include "kernels.h"
#include "vec_portable.h"
//
#include "block_loops.h"

namespace {

template <class Element>
struct Int8 : OfInt8<Element, OfTiles<Int8<Element>>> {
  static constexpr int kRowWords = 16;
  static constexpr int64_t kDepthUnits = 256;

  static void put_int8(uint32_t* a, const Vec* part) {
    int8_t bytes[64];
    for (int i = 0; i < 64; ++i) {
      bytes[i] = static_cast<int8_t>(std::nearbyint(part[i / 16].lane[i % 16]));
    }
    std::memcpy(a, bytes, sizeof(bytes));
  }

  template <int M, int V>
  static void tile(const uint32_t* a, const uint32_t* b, int64_t panel_words, int64_t units,
                   float* c, int64_t c_stride, bool more, Ahead) {
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < V; ++j) {
        row(a + i * kRowWords, M * kRowWords, b + (j / 2) * panel_words + (j % 2) * 16, units,
            c + i * c_stride + 16 * j, more);
      }
    }
  }

  static void row(const uint32_t* a, int64_t chunk_words, const uint32_t* b, int64_t units,
                  float* c, bool more) {
    int32_t total[16] = {};
    if (more) std::memcpy(total, c, sizeof(total));
    for (; units > 0; units -= kChunk, a += chunk_words) {
      int8_t left[64];
      std::memcpy(left, a, sizeof(left));
      for (int64_t k = 0; k < min_of(units, kChunk); ++k, b += kPanel) {
        int8_t right[64];
        std::memcpy(right, b, sizeof(right));
        for (int j = 0; j < 16; ++j) {
          for (int e = 0; e < 4; ++e) total[j] += left[4 * k + e] * right[4 * j + e];
        }
      }
    }
    std::memcpy(c, total, sizeof(total));
  }
};

constexpr Kernels kFloat32 = make_int8_kernels<Int8<float>>("portable");
constexpr Kernels kBFloat16 = make_int8_kernels<Int8<uint16_t>>("portable");

}  // namespace

const beit3_fast::cpu::Kernels* beit3_fast::cpu::portable_int8_kernels(DType rows) {
  return rows == DType::kFloat32 ? &::kFloat32 : &::kBFloat16;
}
