#include "packed_weight.h"

#include <cstring>

#include "isa.h"

namespace beit3_fast::cpu {
namespace {

// Every level reads the same panels; a level that wants others gets another layout number.
constexpr uint32_t kMagic = 0x33544542;  // "BET3" in memory
constexpr uint32_t kLayout = 1;

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

}  // namespace

int64_t panel_words(DType dtype, int64_t in_features) {
  const int64_t chunk = dtype == DType::kBFloat16 ? 2 * kChunk : kChunk;
  return (in_features + chunk - 1) / chunk * kChunk * kPanel;
}

int64_t packed_bytes(DType dtype, int64_t out_features, int64_t in_features) {
  return kHeaderBytes + panel_count(out_features) * panel_words(dtype, in_features) * 4;
}

void pack_weight(const Pool& pool, DType dtype, const void* weight, int64_t stride,
                 int64_t out_features, int64_t in_features, void* packed) {
  Header header{};
  header.magic = kMagic;
  header.layout = kLayout;
  header.dtype = static_cast<int32_t>(dtype);
  header.out_features = out_features;
  header.in_features = in_features;
  std::memcpy(packed, &header, sizeof(header));

  const Kernels& level = kernels(dtype);
  const int64_t row_bytes = stride * (dtype == DType::kBFloat16 ? 2 : 4);
  const int64_t words = panel_words(dtype, in_features);
  auto* const panels = reinterpret_cast<uint32_t*>(static_cast<char*>(packed) + kHeaderBytes);
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

void unpack_weight(const Pool& pool, DType dtype, const void* packed, int64_t out_features,
                   int64_t in_features, void* weight) {
  const int64_t per_unit = dtype == DType::kBFloat16 ? 2 : 1;
  const int64_t words = panel_words(dtype, in_features);
  const uint32_t* const panels = panels_of(packed);
  share(pool, panel_count(out_features), [&](int64_t panel) {
    const int64_t first = panel * kPanel;
    const int64_t count = out_features - first < kPanel ? out_features - first : kPanel;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < in_features; ++i) {
        const uint32_t unit = panels[panel * words + i / per_unit * kPanel + j];
        const int64_t at = (first + j) * in_features + i;
        if (per_unit == 1) {
          static_cast<uint32_t*>(weight)[at] = unit;
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
