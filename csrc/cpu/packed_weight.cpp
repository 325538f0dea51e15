#include "packed_weight.h"

#include <cmath>
#include <cstring>
#include <limits>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "elements.h"
#include "isa.h"

namespace beit3_fast::cpu {
namespace {

// Every level reads the same panels; a level that wants others gets another layout number.
constexpr uint32_t kMagic = 0x33544542;  // "BET3" in memory
constexpr uint32_t kLayout = 2;

struct Header {
  uint32_t magic;
  uint32_t layout;
  int32_t dtype;
  uint32_t reserved;
  int64_t out_features;
  int64_t in_features;
  char padding[kHeaderBytes - 32];
};
static_assert(sizeof(Header) == kHeaderBytes, "the header is one cache line");

// Asks for huge pages: the panels of a model outgrow what the processor knows of small ones, and
// every product walks through all of them. Memory is not touched; a refusal costs speed only.
void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

char* put_header(DType dtype, int64_t out_features, int64_t in_features, void* packed) {
  ask_for_huge_pages(packed, packed_bytes(dtype, out_features, in_features));
  Header header{};
  header.magic = kMagic;
  header.layout = kLayout;
  header.dtype = static_cast<int32_t>(dtype);
  header.out_features = out_features;
  header.in_features = in_features;
  std::memcpy(packed, &header, sizeof(header));
  return static_cast<char*>(packed) + kHeaderBytes;
}

void pack(const Kernels& level, const Pool& pool, DType dtype, const void* weight, int64_t stride,
          int64_t out_features, int64_t in_features, void* packed) {
  const int64_t row_bytes = stride * bytes_of(dtype);
  const int64_t words = panel_words(dtype, in_features);
  auto* const panels =
      reinterpret_cast<uint32_t*>(put_header(dtype, out_features, in_features, packed));
  share(pool, panel_count(out_features), [&](int64_t panel) {
    const int64_t first = panel * kPanel;
    const int64_t count = out_features - first < kPanel ? out_features - first : kPanel;
    const void* rows[kPanel];
    for (int64_t j = 0; j < count; ++j) {
      rows[j] = static_cast<const char*>(weight) + (first + j) * row_bytes;
    }
    level.pack_panel(rows, count, in_features, panels + panel * words);
  });
}

}  // namespace

int64_t panel_words(DType dtype, int64_t in_features) {
  const int64_t chunk = kChunk * 4 / bytes_of(dtype);
  return (in_features + chunk - 1) / chunk * kChunk * kPanel;
}

int64_t packed_bytes(DType dtype, int64_t out_features, int64_t in_features) {
  const int64_t words = panel_words(dtype, in_features) + (dtype == DType::kInt8 ? 2 * kPanel : 0);
  return kHeaderBytes + panel_count(out_features) * words * 4;
}

void pack_weight(const Pool& pool, DType dtype, const void* weight, int64_t stride,
                 int64_t out_features, int64_t in_features, void* packed) {
  pack(kernels(dtype), pool, dtype, weight, stride, out_features, in_features, packed);
}

void pack_transposed(const Pool& pool, DType dtype, const void* x, int64_t stride,
                     int64_t out_features, int64_t in_features, void* packed) {
  const Kernels& level = kernels(dtype);
  const int64_t words = panel_words(dtype, in_features);
  auto* const panels =
      reinterpret_cast<uint32_t*>(put_header(dtype, out_features, in_features, packed));
  share(pool, panel_count(out_features), [&](int64_t panel) {
    level.pack_transposed(x, stride, in_features, out_features, panel * kPanel,
                          panels + panel * words);
  });
}

void pack_weight_portably(const Pool& pool, DType dtype, const void* weight, int64_t stride,
                          int64_t out_features, int64_t in_features, void* packed) {
  pack(*portable_kernels(dtype), pool, dtype, weight, stride, out_features, in_features, packed);
}

void quantize_weight(const Pool& pool, DType dtype, const void* weight, int64_t stride,
                     int64_t out_features, int64_t in_features, void* packed) {
  const int64_t row_bytes = stride * bytes_of(dtype);
  const int64_t panels = panel_count(out_features), words = panel_words(DType::kInt8, in_features);
  char* const base = put_header(DType::kInt8, out_features, in_features, packed);
  auto* const scales = reinterpret_cast<float*>(base + panels * words * 4);
  auto* const offsets = reinterpret_cast<int32_t*>(scales + panels * kPanel);
  share(pool, panels, [&](int64_t panel) {
    auto* const bytes = reinterpret_cast<int8_t*>(base + panel * words * 4);
    std::memset(bytes, 0, static_cast<std::size_t>(words) * 4);
    for (int64_t j = 0; j < kPanel; ++j) {
      const int64_t column = panel * kPanel + j;
      scales[column] = 0.0f;
      offsets[column] = 0;
      if (column >= out_features) continue;
      const void* const row = static_cast<const char*>(weight) + column * row_bytes;
      float largest = 0.0f;
      bool finite = true;
      for (int64_t i = 0; i < in_features; ++i) {
        const float w = load_element(dtype, row, i);
        finite = finite && std::isfinite(w);
        largest = std::fmax(largest, std::fabs(w));
      }
      scales[column] = finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
      const float inverse = 127.0f / largest;
      if (!finite || !std::isfinite(inverse)) continue;
      int32_t sum = 0;
      for (int64_t i = 0; i < in_features; ++i) {
        const auto q = static_cast<int8_t>(std::lrint(load_element(dtype, row, i) * inverse));
        bytes[(i / 4 * kPanel + j) * 4 + i % 4] = q;
        sum += q;
      }
      offsets[column] = 128 * sum;
    }
  });
}

void unpack_weight(const Pool& pool, DType dtype, const void* packed, int64_t out_features,
                   int64_t in_features, void* weight) {
  const int64_t per_unit = 4 / bytes_of(dtype);
  const int64_t words = panel_words(dtype, in_features);
  const uint32_t* const panels = panels_of(packed);
  const auto* const scales =
      reinterpret_cast<const float*>(panels + panel_count(out_features) * words);
  share(pool, panel_count(out_features), [&](int64_t panel) {
    const int64_t first = panel * kPanel;
    const int64_t count = out_features - first < kPanel ? out_features - first : kPanel;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < in_features; ++i) {
        const uint32_t unit = panels[panel * words + i / per_unit * kPanel + j];
        const int64_t at = (first + j) * in_features + i;
        if (per_unit == 1) {
          static_cast<uint32_t*>(weight)[at] = unit;
        } else if (per_unit == 4) {
          const auto q = static_cast<int8_t>(unit >> (i % 4 * 8));
          static_cast<float*>(weight)[at] = static_cast<float>(q) * scales[first + j];
        } else {
          static_cast<uint16_t*>(weight)[at] = static_cast<uint16_t>(unit >> (i % 2 * 16));
        }
      }
    }
  });
}

bool is_packed(const void* packed, int64_t bytes, DType dtype, int64_t out_features,
               int64_t in_features) {
  if (bytes != packed_bytes(dtype, out_features, in_features)) return false;
  Header header;
  std::memcpy(&header, packed, sizeof(header));
  return header.magic == kMagic && header.layout == kLayout &&
         header.dtype == static_cast<int32_t>(dtype) && header.out_features == out_features &&
         header.in_features == in_features;
}

}  // namespace beit3_fast::cpu
