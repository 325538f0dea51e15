#include "isa.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "elements.h"
#include "packed_weight.h"
#include "parallel.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace beit3_fast::cpu {
namespace {

// From the plainest to the best; each CPU that has a level has those above it here.
struct Level {
  Isa isa;
  const char* name;
  const Kernels* (*kernels)(DType);
  const Kernels* (*int8_kernels)(DType);
};
const Kernels* none(DType) { return nullptr; }
constexpr Level kLevels[] = {
    {Isa::kPortable, "portable", portable_kernels, portable_int8_kernels},
    {Isa::kAvx2, "avx2", avx2_kernels, avx2_int8_kernels},
    {Isa::kAvx512, "avx512", avx512_kernels, avx512_int8_kernels},
    {Isa::kAvx512Vnni, "avx512_vnni", none, avx512vnni_int8_kernels},
    {Isa::kAvx512Bf16, "avx512_bf16", avx512bf16_kernels, none},
    {Isa::kAmxBf16, "amx_bf16", amx_kernels, amx_int8_kernels},
};

bool compiled(const Level& level) {
  return level.kernels(DType::kBFloat16) != nullptr ||
         level.int8_kernels(DType::kBFloat16) != nullptr;
}

// AMX with bf16 and int8 products, and Linux's leave to use its 8 KB of registers: one leave for
// the process.
bool amx() {
#if defined(__linux__) && defined(__x86_64__)
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr uint32_t kTileBf16Int8 = 1u << 24 | 1u << 22 | 1u << 25;
  if ((d & kTileBf16Int8) != kTileBf16Int8) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

bool supported(Isa isa) {
#ifdef BEIT3_FAST_EMULATE
  return true;
#endif
  if (isa == Isa::kPortable) return true;
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Vnni:
      return vnni;
    case Isa::kAvx512Bf16:
      return vnni && __builtin_cpu_supports("avx512bf16");
    case Isa::kAmxBf16:
      return vnni && __builtin_cpu_supports("avx512bf16") && amx();
    default:
      break;
  }
#endif
  return false;
}

// y = x W^T for numbers of no pattern, in odd sizes; the weight is of the rows' dtype or int8.
std::vector<float> product(const Kernels& level, DType dtype, bool int8) {
  constexpr int64_t rows = 37, depth = 1093, columns = 45;
  uint32_t state = 1;
  const auto numbers = [&](int64_t count) {
    std::vector<float> out(static_cast<std::size_t>(count));  // room for either dtype
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      const uint32_t bits = 0x3f000000u | (state & 0x80ffffffu);  // 0.5 to 2, both signs
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      store_element(dtype, out.data(), i, value);
    }
    return out;
  };
  const auto x = numbers(rows * depth), weight = numbers(columns * depth);
  const Pool alone{1, nullptr};
  Scratch packed, scratch;
  const DType form = int8 ? DType::kInt8 : dtype;
  void* const b = packed.at_least(packed_bytes(form, columns, depth));
  const auto pack = int8 ? quantize_weight : pack_weight_portably;
  pack(alone, dtype, weight.data(), depth, columns, depth, b);
  std::vector<float> y(static_cast<std::size_t>(rows * columns));
  LinearBlock block{};
  block.x = x.data();
  block.x_stride = depth;
  block.out = y.data();
  block.out_stride = columns;
  block.count = rows;
  block.in_features = depth;
  block.out_features = columns;
  const uint32_t* const parts[] = {panels_of(b)};
  block.parts = parts;
  block.part_panels = block.panel_end = panel_count(columns);
  level.linear.block(block, scratch.at_least(level.linear.scratch(block)));
  std::vector<float> out;
  for (int64_t i = 0; i < rows * columns; ++i) {
    out.push_back(load_element(dtype, y.data(), i));
  }
  return out;
}

// Whether tile products on this processor are what the portable ones are. Tried once a process,
// since most machines that these kernels are tested on lack the unit.
bool amx_agrees() {
  const auto agree = [](DType dtype, bool int8, float relative, float absolute) {
    const auto* const portable = (int8 ? portable_int8_kernels : portable_kernels)(dtype);
    const auto* const level = (int8 ? amx_int8_kernels : amx_kernels)(dtype);
    const auto expected = product(*portable, dtype, int8);
    const auto found = product(*level, dtype, int8);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      if (!(std::fabs(found[i] - expected[i]) <= relative * std::fabs(expected[i]) + absolute)) {
        std::fprintf(
            stderr,
            "beit3_fast: the AMX kernels gave a wrong product on this processor and are left "
            "out; please report it together with /proc/cpuinfo\n");
        return false;
      }
    }
    return true;
  };
  return agree(DType::kBFloat16, false, 0.02f, 0.5f) &&
         agree(DType::kBFloat16, true, 0.02f, 0.5f) && agree(DType::kFloat32, false, 1e-4f, 1e-3f);
}

// The level that BEIT3_FAST_CPU_ISA names, in any case and with spaces around it; the highest where
// it names none.
Isa allowed() {
  const char* const value = std::getenv("BEIT3_FAST_CPU_ISA");
  std::string wish = value == nullptr ? "" : value;
  constexpr const char* kSpaces = " \t\r\n";
  wish.erase(0, wish.find_first_not_of(kSpaces));
  wish.erase(wish.find_last_not_of(kSpaces) + 1);
  for (char& c : wish) c = 'A' <= c && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  if (wish.empty()) return Isa::kAmxBf16;
  std::string names;
  for (const Level& level : kLevels) {
    if (wish == level.name) return level.isa;
    names += (names.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::runtime_error("BEIT3_FAST_CPU_ISA must be one of " + names + ", got '" + value + "'");
}

// From the highest allowed level down: of those above it nothing is asked and nothing is run.
Isa choose() {
  for (int at = static_cast<int>(allowed()); at > 0; --at) {
    const Level& level = kLevels[at];
    if (compiled(level) && supported(level.isa) && (level.isa != Isa::kAmxBf16 || amx_agrees())) {
      return level.isa;
    }
  }
  return Isa::kPortable;
}

// Those of the current level, or of the nearest below that has them.
const Kernels& nearest(const Kernels* (*Level::*of)(DType), DType dtype) {
  int at = static_cast<int>(isa());
  while ((kLevels[at].*of)(dtype) == nullptr) --at;
  return *(kLevels[at].*of)(dtype);
}

}  // namespace

const char* isa_name(Isa isa) { return kLevels[static_cast<int>(isa)].name; }

Isa isa() {
  // Not a static that is made once: a child forked meanwhile would wait for the thread that makes
  // it. Threads that come at once choose the same.
  static std::atomic<int32_t> chosen{-1};
  int32_t level = chosen.load(std::memory_order_relaxed);
  if (level < 0) {
    level = static_cast<int32_t>(choose());
    chosen.store(level, std::memory_order_relaxed);
  }
  return static_cast<Isa>(level);
}

const Kernels& kernels(DType dtype) { return nearest(&Level::kernels, dtype); }
const Kernels& int8_kernels(DType rows) { return nearest(&Level::int8_kernels, rows); }

}  // namespace beit3_fast::cpu
