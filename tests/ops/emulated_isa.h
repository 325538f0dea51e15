// AVX-512, AVX-512 BF16 and AMX in plain C++: what the kernels use of them, so
// that their sources run on any x86 processor with AVX2. Included before
// everything else (csrc is compiled as it is).
//
// The real headers come first: they declare the vector types, and would not
// compile after the macros.
#pragma once

#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1

#pragma GCC diagnostic ignored "-Wpsabi"

namespace {
namespace emulated {

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = int16_t __attribute__((vector_size(64)));
using Pairs = int64_t __attribute__((vector_size(64)));

template <class To, class From> inline To bits(const From &from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class F> inline __m512 each(F f) {
  __m512 out;
  for (int i = 0; i < 16; ++i)
    out[i] = f(i);
  return out;
}
template <class F> inline __m512i each_int(F f) {
  Ints out;
  for (int i = 0; i < 16; ++i)
    out[i] = f(i);
  return bits<__m512i>(out);
}

inline float widen(uint16_t x) {
  return bits<float>(static_cast<uint32_t>(x) << 16);
}
inline uint16_t narrow(float x) {
  const auto word = bits<uint32_t>(x);
  if (x != x)
    return static_cast<uint16_t>((word >> 16) | 0x40u);
  return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}
inline float dot(float sum, uint32_t a, uint32_t b) {
  sum = std::fma(widen(static_cast<uint16_t>(a >> 16)),
                 widen(static_cast<uint16_t>(b >> 16)), sum);
  return std::fma(widen(static_cast<uint16_t>(a)),
                  widen(static_cast<uint16_t>(b)), sum);
}

// Four products of 8-bit numbers, the second ones signed. They cannot
// overflow in as few as the tests add up, so that an overflow is a bug.
template <class Left>
inline int32_t dot_fours(int32_t sum, uint32_t a, uint32_t b) {
  for (int i = 0; i < 4; ++i)
    sum += static_cast<Left>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return sum;
}

// Memory: a masked access touches no element outside the mask.
inline __m512 load(const void *p) {
  __m512 out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}
template <class V> inline void store(void *p, V a) {
  static_assert(sizeof(V) == 64, "a whole register");
  std::memcpy(p, &a, sizeof(a));
}
template <class Register, class Element>
inline Register load_some(uint64_t mask, const void *p) {
  Register out;
  std::memset(&out, 0, sizeof(out));
  for (unsigned i = 0; i < sizeof(Register) / sizeof(Element); ++i) {
    if (mask >> i & 1) {
      std::memcpy(reinterpret_cast<char *>(&out) + i * sizeof(Element),
                  static_cast<const char *>(p) + i * sizeof(Element),
                  sizeof(Element));
    }
  }
  return out;
}
template <class Element, class Register>
inline void store_some(void *p, uint64_t mask, Register a) {
  for (unsigned i = 0; i < sizeof(Register) / sizeof(Element); ++i) {
    if (mask >> i & 1) {
      std::memcpy(static_cast<char *>(p) + i * sizeof(Element),
                  reinterpret_cast<const char *>(&a) + i * sizeof(Element),
                  sizeof(Element));
    }
  }
}

inline __m512i unpack32(__m512i a, __m512i b, int first) {
  const auto x = bits<Ints>(a), y = bits<Ints>(b);
  return each_int([&](int i) {
    const int from = i / 4 * 4 + first + i % 4 / 2;
    return i % 2 ? y[from] : x[from];
  });
}
inline __m512i unpack64(__m512i a, __m512i b, int first) {
  Pairs out;
  const auto x = bits<Pairs>(a), y = bits<Pairs>(b);
  for (int i = 0; i < 8; ++i)
    out[i] = i % 2 ? y[i / 2 * 2 + first] : x[i / 2 * 2 + first];
  return bits<__m512i>(out);
}
inline __m512i shuffle_quarters(__m512i a, __m512i b, int control) {
  const auto x = bits<Ints>(a), y = bits<Ints>(b);
  return each_int([&](int i) {
    const int quarter = i / 4;
    const int from = (control >> (2 * quarter) & 3) * 4 + i % 4;
    return quarter < 2 ? x[from] : y[from];
  });
}
inline __m512 scale_by_power(__m512 a, __m512 b) {
  return each([&](int i) {
    if (b[i] == -INFINITY)
      return 0.0f;
    return b[i] != b[i] ? b[i]
                        : std::ldexp(a[i], static_cast<int>(std::floor(b[i])));
  });
}

struct Tiles {
  bool configured;
  uint8_t rows[8];
  uint16_t row_bytes[8];
  unsigned char data[8][16][64];
};
inline Tiles &tiles() {
  thread_local Tiles state;
  return state;
}
inline void need(bool condition) {
  if (!condition)
    std::abort(); // where the processor would fault
}
inline void tile_config(const void *p) {
  const auto *bytes = static_cast<const unsigned char *>(p);
  need(bytes[0] == 1);
  need(std::getenv("BEIT3_FAST_TEST_NO_TILES") == nullptr);
  Tiles &state = tiles();
  std::memset(&state, 0, sizeof(state));
  state.configured = true;
  for (int i = 0; i < 8; ++i) {
    std::memcpy(&state.row_bytes[i], bytes + 16 + 2 * i, 2);
    state.rows[i] = bytes[48 + i];
    need(state.rows[i] >= 1 && state.rows[i] <= 16 && state.row_bytes[i] <= 64);
  }
}
inline void tile_release() { tiles().configured = false; }
inline void tile_zero(int t) {
  need(tiles().configured);
  std::memset(tiles().data[t], 0, sizeof(tiles().data[t]));
}
inline void tile_load(int t, const void *base, int64_t stride) {
  Tiles &state = tiles();
  tile_zero(t);
  for (int r = 0; r < state.rows[t]; ++r) {
    std::memcpy(state.data[t][r], static_cast<const char *>(base) + r * stride,
                state.row_bytes[t]);
  }
}
inline void tile_store(int t, void *base, int64_t stride) {
  Tiles &state = tiles();
  need(state.configured);
  for (int r = 0; r < state.rows[t]; ++r) {
    std::memcpy(static_cast<char *>(base) + r * stride, state.data[t][r],
                state.row_bytes[t]);
  }
}
// A tile's products of even and of odd elements are summed up apart and then
// added to what is there: bit for bit what a processor with AMX gave for 20,000
// tiles of random numbers.
struct EvenAndOdd {
  float even = 0, odd = 0;
};
inline EvenAndOdd dot_apart(EvenAndOdd sum, uint32_t a, uint32_t b) {
  return {std::fma(widen(static_cast<uint16_t>(a)),
                   widen(static_cast<uint16_t>(b)), sum.even),
          std::fma(widen(static_cast<uint16_t>(a >> 16)),
                   widen(static_cast<uint16_t>(b >> 16)), sum.odd)};
}
inline float whole(EvenAndOdd sum) { return sum.even + sum.odd; }
inline int32_t whole(int32_t sum) { return sum; }

template <class Sum, class Part, class Dot>
inline void tile_dot(int c, int a, int b, Dot multiply) {
  Tiles &state = tiles();
  need(state.configured && state.rows[a] == state.rows[c] &&
       state.row_bytes[a] == 4 * state.rows[b] &&
       state.row_bytes[b] == state.row_bytes[c]);
  for (int r = 0; r < state.rows[c]; ++r) {
    Sum sums[16];
    std::memcpy(sums, state.data[c][r], sizeof(sums));
    Part parts[16] = {};
    for (int k = 0; k < state.rows[b]; ++k) {
      uint32_t left, right[16];
      std::memcpy(&left, state.data[a][r] + 4 * k, sizeof(left));
      std::memcpy(right, state.data[b][k], sizeof(right));
      for (int j = 0; j < state.row_bytes[c] / 4; ++j)
        parts[j] = multiply(parts[j], left, right[j]);
    }
    for (int j = 0; j < state.row_bytes[c] / 4; ++j)
      sums[j] += whole(parts[j]);
    std::memcpy(state.data[c][r], sums, sizeof(sums));
  }
}

inline void tile_dot_bf16(int c, int a, int b) {
  tile_dot<float, EvenAndOdd>(c, a, b, dot_apart);
}
inline void tile_dot_int8(int c, int a, int b) {
  tile_dot<int32_t, int32_t>(c, a, b, dot_fours<int8_t>);
}

} // namespace emulated
} // namespace

// The intrinsics, by their own names; a macro sends each call here.
namespace {
namespace emulated {

inline __m512 setzero_ps() { return __m512{}; }
inline __m512i setzero_si512() { return __m512i{}; }
inline __m512 set1_ps(float x) {
  return each([&](int) { return x; });
}
inline __m512i set1_epi32(int x) {
  return each_int([&](int) { return x; });
}
inline __m512 add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return each([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
inline __m512 fmsub_ps(__m512 a, __m512 b, __m512 c) {
  return each([&](int i) { return std::fma(a[i], b[i], -c[i]); });
}
inline __m512 fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return each([&](int i) { return std::fma(-a[i], b[i], c[i]); });
}
// As the processor does: the second operand where either is not a number.
inline __m512 max_ps(__m512 a, __m512 b) {
  return each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline __m512 min_ps(__m512 a, __m512 b) {
  return each([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
inline __m512 abs_ps(__m512 a) {
  return each([&](int i) { return std::fabs(a[i]); });
}
inline float reduce_add_ps(__m512 a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i)
      a[i] += a[i + width];
  }
  return a[0];
}
inline float reduce_max_ps(__m512 a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i)
      a[i] = a[i] > a[i + width] ? a[i] : a[i + width];
  }
  return a[0];
}
inline __m512 roundscale_ps(__m512 a, int) {
  return each([&](int i) { return std::nearbyint(a[i]); });
}
inline __m512 reduce_ps(__m512 a, int rounding) {
  if (rounding != (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC))
    std::abort();
  return each(
      [&](int i) { return std::isinf(a[i]) ? 0.0f : a[i] - std::floor(a[i]); });
}
inline __m512 scalef_ps(__m512 a, __m512 b) { return scale_by_power(a, b); }
inline __m512 permutexvar_ps(__m512i index, __m512 a) {
  const auto at = bits<Ints>(index);
  return each([&](int i) { return a[at[i] & 15]; });
}
inline __m512 mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  return each([&](int i) { return mask >> i & 1 ? b[i] : a[i]; });
}
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  if (predicate != _CMP_UNORD_Q)
    std::abort();
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i)
    mask |= static_cast<unsigned>(a[i] != a[i] || b[i] != b[i]) << i;
  return static_cast<__mmask16>(mask);
}

inline __m512 castsi512_ps(__m512i a) { return bits<__m512>(a); }
inline __m512i castps_si512(__m512 a) { return bits<__m512i>(a); }
inline __m256i extracti64x4_epi64(__m512i a, int half) {
  __m256i out;
  std::memcpy(&out, reinterpret_cast<const char *>(&a) + 32 * half,
              sizeof(out));
  return out;
}
inline __m256i castsi512_si256(__m512i a) { return extracti64x4_epi64(a, 0); }

inline __m512i add_epi32(__m512i a, __m512i b) {
  return bits<__m512i>(bits<Words>(a) + bits<Words>(b));
}
inline __m512i sub_epi32(__m512i a, __m512i b) {
  return bits<__m512i>(bits<Words>(a) - bits<Words>(b));
}
inline __m512i slli_epi16(__m512i a, int n) {
  return bits<__m512i>(bits<Halves>(a) << n);
}
inline __m512i srai_epi16(__m512i a, int n) {
  return bits<__m512i>(bits<Halves>(a) >> n);
}
inline __m512i madd_epi16(__m512i a, __m512i b) {
  const auto x = bits<Halves>(a), y = bits<Halves>(b);
  return each_int([&](int i) {
    return x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  });
}
inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const auto s = bits<Ints>(sum);
  const auto x = bits<Words>(a), y = bits<Words>(b);
  return each_int([&](int i) { return dot_fours<uint8_t>(s[i], x[i], y[i]); });
}
inline __m512i xor_si512(__m512i a, __m512i b) { return a ^ b; }
inline __m512 cvtepi32_ps(__m512i a) {
  const auto x = bits<Ints>(a);
  return each([&](int i) { return static_cast<float>(x[i]); });
}
inline int saturated(int x, int most) {
  return x < -most - 1 ? -most - 1 : x > most ? most : x;
}
inline __m512i packs_epi32(__m512i a, __m512i b) {
  const auto x = bits<Ints>(a), y = bits<Ints>(b);
  Halves out;
  for (int i = 0; i < 32; ++i) {
    const int lane = i / 8 * 4 + i % 4;
    out[i] = static_cast<int16_t>(saturated((i / 4 % 2 ? y : x)[lane], 32767));
  }
  return bits<__m512i>(out);
}
inline __m512i packs_epi16(__m512i a, __m512i b) {
  const auto x = bits<Halves>(a), y = bits<Halves>(b);
  std::array<int8_t, 64> out;
  for (int i = 0; i < 64; ++i) {
    const int lane = i / 16 * 8 + i % 8;
    out[static_cast<std::size_t>(i)] =
        static_cast<int8_t>(saturated((i / 8 % 2 ? y : x)[lane], 127));
  }
  return bits<__m512i>(out);
}
inline __m512i permutexvar_epi32(__m512i index, __m512i a) {
  const auto at = bits<Ints>(index), x = bits<Ints>(a);
  return each_int([&](int i) { return x[at[i] & 15]; });
}
inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i slli_epi32(__m512i a, int n) {
  return bits<__m512i>(bits<Words>(a) << n);
}
inline __m512i srli_epi32(__m512i a, int n) {
  return bits<__m512i>(bits<Words>(a) >> n);
}
inline __m512i mask_or_epi32(__m512i other, __mmask16 mask, __m512i a,
                             __m512i b) {
  const auto x = bits<Ints>(a), y = bits<Ints>(b), z = bits<Ints>(other);
  return each_int([&](int i) { return mask >> i & 1 ? x[i] | y[i] : z[i]; });
}
inline __m512i cvtps_epi32(__m512 a) {
  return each_int(
      [&](int i) { return static_cast<int32_t>(std::nearbyint(a[i])); });
}
inline __m512i cvtepu16_epi32(__m256i a) {
  uint16_t x[16];
  std::memcpy(x, &a, sizeof(x));
  return each_int([&](int i) { return static_cast<int32_t>(x[i]); });
}
inline __m256i cvtepi32_epi16(__m512i a) {
  const auto x = bits<Words>(a);
  uint16_t out[16];
  for (int i = 0; i < 16; ++i)
    out[i] = static_cast<uint16_t>(x[i]);
  return bits<__m256i>(out);
}
inline __m512i unpacklo_epi32(__m512i a, __m512i b) {
  return unpack32(a, b, 0);
}
inline __m512i unpackhi_epi32(__m512i a, __m512i b) {
  return unpack32(a, b, 2);
}
inline __m512i unpacklo_epi64(__m512i a, __m512i b) {
  return unpack64(a, b, 0);
}
inline __m512i unpackhi_epi64(__m512i a, __m512i b) {
  return unpack64(a, b, 1);
}
inline __m512i shuffle_i32x4(__m512i a, __m512i b, int control) {
  return shuffle_quarters(a, b, control);
}
inline __m512 shuffle_f32x4(__m512 a, __m512 b, int control) {
  return bits<__m512>(
      shuffle_quarters(bits<__m512i>(a), bits<__m512i>(b), control));
}

inline __m256i cvtneps_pbh(__m512 a) {
  uint16_t out[16];
  for (int i = 0; i < 16; ++i)
    out[i] = narrow(a[i]);
  return bits<__m256i>(out);
}
inline __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  uint16_t out[32];
  for (int i = 0; i < 16; ++i) {
    out[i] = narrow(low[i]);
    out[16 + i] = narrow(high[i]);
  }
  return bits<__m512i>(out);
}
template <class Bf16> inline __m512 dpbf16_ps(__m512 sum, Bf16 a, Bf16 b) {
  const auto x = bits<Words>(a), y = bits<Words>(b);
  return each([&](int i) { return dot(sum[i], x[i], y[i]); });
}

inline __m512 load_ps(const void *p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0)
    std::abort();
  return load(p);
}
inline __m512 loadu_ps(const void *p) { return load(p); }
inline __m512i loadu_si512(const void *p) { return bits<__m512i>(load(p)); }
inline void storeu_ps(void *p, __m512 a) { store(p, a); }
inline void storeu_si512(void *p, __m512i a) { store(p, a); }
inline __m512 maskz_loadu_ps(__mmask16 mask, const void *p) {
  return load_some<__m512, uint32_t>(mask, p);
}
inline __m512i maskz_loadu_epi32(__mmask16 mask, const void *p) {
  return load_some<__m512i, uint32_t>(mask, p);
}
inline __m512i maskz_loadu_epi16(__mmask32 mask, const void *p) {
  return load_some<__m512i, uint16_t>(mask, p);
}
inline void mask_storeu_ps(void *p, __mmask16 mask, __m512 a) {
  store_some<uint32_t>(p, mask, a);
}
inline __m256i half_maskz_loadu_epi16(__mmask16 mask, const void *p) {
  return load_some<__m256i, uint16_t>(mask, p);
}
inline void half_mask_storeu_epi16(void *p, __mmask16 mask, __m256i a) {
  store_some<uint16_t>(p, mask, a);
}

} // namespace emulated
} // namespace

#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated::setzero_ps
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 emulated::setzero_si512
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::set1_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::set1_epi32
#undef _mm512_add_ps
#define _mm512_add_ps emulated::add_ps
#undef _mm512_sub_ps
#define _mm512_sub_ps emulated::sub_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated::mul_ps
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_fmsub_ps
#define _mm512_fmsub_ps emulated::fmsub_ps
#undef _mm512_fnmadd_ps
#define _mm512_fnmadd_ps emulated::fnmadd_ps
#undef _mm512_max_ps
#define _mm512_max_ps emulated::max_ps
#undef _mm512_min_ps
#define _mm512_min_ps emulated::min_ps
#undef _mm512_abs_ps
#define _mm512_abs_ps emulated::abs_ps
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#undef _mm512_reduce_ps
#define _mm512_reduce_ps emulated::reduce_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated::scalef_ps
#undef _mm512_permutexvar_ps
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#undef _mm512_mask_blend_ps
#define _mm512_mask_blend_ps emulated::mask_blend_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated::castsi512_ps
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated::castps_si512
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 emulated::extracti64x4_epi64
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 emulated::castsi512_si256
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated::add_epi32
#undef _mm512_and_si512
#define _mm512_and_si512 emulated::and_si512
#undef _mm512_or_si512
#define _mm512_or_si512 emulated::or_si512
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#undef _mm512_mask_or_epi32
#define _mm512_mask_or_epi32 emulated::mask_or_epi32
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 emulated::unpacklo_epi32
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 emulated::unpackhi_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 emulated::unpacklo_epi64
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 emulated::unpackhi_epi64
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#undef _mm512_load_ps
#define _mm512_load_ps emulated::load_ps
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated::loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated::loadu_si512
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#undef _mm512_maskz_loadu_epi32
#define _mm512_maskz_loadu_epi32 emulated::maskz_loadu_epi32
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 emulated::half_maskz_loadu_epi16
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 emulated::half_mask_storeu_epi16
#undef _mm512_and_epi32
#define _mm512_and_epi32 emulated::and_si512
#undef _tile_loadconfig
#define _tile_loadconfig emulated::tile_config
#undef _tile_release
#define _tile_release emulated::tile_release
#undef _tile_zero
#define _tile_zero emulated::tile_zero
#undef _tile_loadd
#define _tile_loadd emulated::tile_load
#undef _tile_stream_loadd
#define _tile_stream_loadd emulated::tile_load
#undef _tile_stored
#define _tile_stored emulated::tile_store
#undef _tile_dpbf16ps
#define _tile_dpbf16ps emulated::tile_dot_bf16
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 emulated::slli_epi16
#undef _mm512_srai_epi16
#define _mm512_srai_epi16 emulated::srai_epi16
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 emulated::madd_epi16
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#undef _mm512_xor_si512
#define _mm512_xor_si512 emulated::xor_si512
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#undef _mm512_packs_epi32
#define _mm512_packs_epi32 emulated::packs_epi32
#undef _mm512_packs_epi16
#define _mm512_packs_epi16 emulated::packs_epi16
#undef _mm512_permutexvar_epi32
#define _mm512_permutexvar_epi32 emulated::permutexvar_epi32
#undef _tile_dpbssd
#define _tile_dpbssd emulated::tile_dot_int8
