// Products of warp groups, for each number of columns that a kernel uses.
#pragma once

#include "portable.cuh"

namespace beit3_fast::cuda {

// Begins d = a b^T, or d += a b^T: a [64, 16] and b [kColumns, 16] (of 8-bit numbers 32) in shared
// memory, K along the rows. Thread 4 g + t of warp w holds rows 16 w + g and 16 w + g + 8, of every
// block of 8 columns the columns 2 t and 2 t + 1: d[4 b], d[4 b + 1] of block b in the first row,
// the next two in the second.
template <class T, int kColumns>
__device__ __forceinline__ void wgmma(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add);

// Begins d = a b, or d += a b: a [64, 16] in registers, b [16, kColumns] in shared memory, K down
// the rows. a[0], a[2] are the thread's first row, columns 2 t and 2 t + 8 on; a[1], a[3] its
// second.
template <class T, int kColumns>
__device__ __forceinline__ void wgmma_transposed(float (&d)[kColumns / 2], const uint32_t (&a)[4],
                                                 uint64_t b, bool add);

// clang-format off
#define NUMBERS_8(a, b, c, d, e, f, g, h) \
  "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define NUMBERS_16 NUMBERS_8(0, 1, 2, 3, 4, 5, 6, 7) "," NUMBERS_8(8, 9, 10, 11, 12, 13, 14, 15)
#define NUMBERS_32 \
  NUMBERS_16 "," \
  NUMBERS_8(16, 17, 18, 19, 20, 21, 22, 23) "," \
  NUMBERS_8(24, 25, 26, 27, 28, 29, 30, 31)
#define NUMBERS_40 NUMBERS_32 "," NUMBERS_8(32, 33, 34, 35, 36, 37, 38, 39)
#define NUMBERS_48 NUMBERS_40 "," NUMBERS_8(40, 41, 42, 43, 44, 45, 46, 47)
#define NUMBERS_64 \
  NUMBERS_48 "," \
  NUMBERS_8(48, 49, 50, 51, 52, 53, 54, 55) "," \
  NUMBERS_8(56, 57, 58, 59, 60, 61, 62, 63)
#define NUMBERS_96 \
  NUMBERS_64 "," \
  NUMBERS_8(64, 65, 66, 67, 68, 69, 70, 71) "," \
  NUMBERS_8(72, 73, 74, 75, 76, 77, 78, 79) "," \
  NUMBERS_8(80, 81, 82, 83, 84, 85, 86, 87) "," \
  NUMBERS_8(88, 89, 90, 91, 92, 93, 94, 95)
#define NUMBERS_100 NUMBERS_96 "," "%96,%97,%98,%99"
#define NUMBERS_128 \
  NUMBERS_96 "," \
  NUMBERS_8(96, 97, 98, 99, 100, 101, 102, 103) "," \
  NUMBERS_8(104, 105, 106, 107, 108, 109, 110, 111) "," \
  NUMBERS_8(112, 113, 114, 115, 116, 117, 118, 119) "," \
  NUMBERS_8(120, 121, 122, 123, 124, 125, 126, 127)
#define SUMS_4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4((i) + 4)
#define SUMS_16 SUMS_8(0), SUMS_8(8)
#define SUMS_32 SUMS_16, SUMS_8(16), SUMS_8(24)
#define SUMS_40 SUMS_32, SUMS_8(32)
#define SUMS_48 SUMS_40, SUMS_8(40)
#define SUMS_64 SUMS_48, SUMS_8(48), SUMS_8(56)
#define SUMS_96 SUMS_64, SUMS_8(64), SUMS_8(72), SUMS_8(80), SUMS_8(88)
#define SUMS_100 SUMS_96, SUMS_4(96)
#define SUMS_128 SUMS_96, SUMS_8(96), SUMS_8(104), SUMS_8(112), SUMS_8(120)

// a, b and add are the numbers of these operands: half the columns, and one and two more.
#define WGMMA(Type, type, columns, half, a_at, b_at, add_at)                                    \
  template <>                                                                                   \
  __device__ __forceinline__ void wgmma<Type, columns>(float (&d)[half], uint64_t a, uint64_t b, \
                                                       bool add) {                              \
    asm volatile(                                                                               \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_at ", 0;\n"                               \
        "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" NUMBERS_##half \
        "}, %" #a_at ", %" #b_at ", add, 1, 1, 0, 0;\n}"                                        \
        : SUMS_##half                                                                           \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                          \
  }

// Products of 8-bit numbers keep some 14 bits of each sum between them.
#define WGMMA_E4M3(columns, half, a_at, b_at, add_at)                                          \
  template <>                                                                                  \
  __device__ __forceinline__ void wgmma<E4M3, columns>(float (&d)[half], uint64_t a, uint64_t b, \
                                                       bool add) {                             \
    asm volatile(                                                                              \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_at ", 0;\n"                              \
        "wgmma.mma_async.sync.aligned.m64n" #columns "k32.f32.e4m3.e4m3 {" NUMBERS_##half        \
        "}, %" #a_at ", %" #b_at ", add, 1, 1;\n}"                                             \
        : SUMS_##half                                                                          \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                         \
  }

// The words of a are the operands from half the columns on, then b and add.
#define WGMMA_TRANSPOSED(Type, type, columns, half, a_at, b_at, add_at)                         \
  template <>                                                                                   \
  __device__ __forceinline__ void wgmma_transposed<Type, columns>(                              \
      float (&d)[half], const uint32_t (&a)[4], uint64_t b, bool add) {                         \
    asm volatile(                                                                               \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_at ", 0;\n"                               \
        "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" NUMBERS_##half \
        "}, {" a_at "}, %" #b_at ", add, 1, 1, 1;\n}"                                           \
        : SUMS_##half                                                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));      \
  }

#define WGMMA_OF(Type, type)                  \
  WGMMA(Type, type, 32, 16, 16, 17, 18) \
  WGMMA(Type, type, 64, 32, 32, 33, 34) \
  WGMMA(Type, type, 80, 40, 40, 41, 42) \
  WGMMA(Type, type, 128, 64, 64, 65, 66) \
  WGMMA(Type, type, 200, 100, 100, 101, 102) \
  WGMMA(Type, type, 256, 128, 128, 129, 130) \
  WGMMA_TRANSPOSED(Type, type, 64, 32, "%32,%33,%34,%35", 36, 37) \
  WGMMA_TRANSPOSED(Type, type, 96, 48, "%48,%49,%50,%51", 52, 53)

WGMMA_OF(BFloat16, "bf16")
WGMMA_OF(Float16, "f16")
WGMMA_E4M3(128, 64, 64, 65, 66)
#undef WGMMA_E4M3
#undef WGMMA_OF
#undef WGMMA_TRANSPOSED
#undef WGMMA
#undef SUMS_4
#undef SUMS_8
#undef SUMS_16
#undef SUMS_32
#undef SUMS_40
#undef SUMS_48
#undef SUMS_64
#undef SUMS_96
#undef SUMS_100
#undef SUMS_128
#undef NUMBERS_8
#undef NUMBERS_16
#undef NUMBERS_32
#undef NUMBERS_40
#undef NUMBERS_48
#undef NUMBERS_64
#undef NUMBERS_96
#undef NUMBERS_100
#undef NUMBERS_128
// clang-format on

}  // namespace beit3_fast::cuda
