// What the launchers of the CUDA kernels ask for, a line each: kernel, threads of a block, bytes of
// dynamic shared memory, blocks that are to share a processor, blocks of a cluster.

#include <cstdio>

#include "cuda/attention_hopper.cuh"
#include "cuda/decode_attention.cuh"
#include "cuda/expert_linear.cuh"
#include "cuda/float8_linear.cuh"
#include "cuda/head_top_k.cuh"
#include "cuda/portable_attention.cuh"
#include "cuda/portable_float8.cuh"
#include "cuda/portable_linear.cuh"
#include "cuda/quantize_rows.cuh"
#include "cuda/row_statistics.cuh"
#include "cuda/split_k_linear.cuh"

namespace {

using namespace beit3_fast::cuda;

template <class Shape>
void print(const char* kernel, const char* type, const char* rest, int resident) {
  std::printf("%s<%s%s> %d %d %d 1\n", kernel, type, rest, Shape::kThreads, Shape::kBytes,
              resident);
}

template <int kHeadDim, int kKeys>
void whole(const char* type) {
  using Shape = WholeShape<kHeadDim, kKeys>;
  char rest[32];
  std::snprintf(rest, sizeof rest, ", %d, %d", kHeadDim, kKeys);
  print<Shape>("attend_whole", type, rest, Shape::kBlocksPerProcessor);
}

template <int kHeadDim>
void heads(const char* type) {
  char rest[32];
  std::snprintf(rest, sizeof rest, ", %d", kHeadDim);
  whole<kHeadDim, 64>(type);
  whole<kHeadDim, 128>(type);
  whole<kHeadDim, 200>(type);
  whole<kHeadDim, 256>(type);
  print<StepShape<kHeadDim>>("attend_in_steps", type, rest, 1);
  using Portable = PortableShape<kHeadDim>;
  print<Portable>("attend_portable", type, rest, Portable::kBlocksPerProcessor);
  print<DecodeShape<kHeadDim>>("attend_cached", type, rest, 1);
}

template <int kBands, int kHigh, int kWide>
void linear(const char* type) {
  using Shape = LinearShape<kBands, kHigh, kWide>;
  for (const char* gathered : {"true", "false"}) {
    std::printf("multiply_experts<%s, %d, %s, %d, %d> %d %d 1 %d\n", type, kBands, gathered, kHigh,
                kWide, Shape::kThreads, Shape::kBytes, Shape::kBlocks);
  }
}

template <int kShares>
void split_k(const char* type) {
  using Shape = SplitKShape<kShares>;
  for (const char* gathered : {"true", "false"}) {
    std::printf("multiply_experts_split_k<%s, %s, %d> %d %d 1 %d\n", type, gathered, kShares,
                Shape::kThreads, Shape::kBytes, kShares);
  }
}

template <int kRows>
void head(const char* type) {
  using Shape = HeadTileShape<kRows>;
  char rest[32];
  std::snprintf(rest, sizeof rest, ", %d", kRows);
  print<Shape>("score_classes", type, rest, Shape::kBlocksPerProcessor);
}

}  // namespace

int main() {
  std::printf("join_classes<1> 32 %d 1 1\n", join_bytes(kMostTiles));
  for (const char* type : {"BFloat16", "Float16"}) {
    heads<64>(type);
    heads<88>(type);
    head<16>(type);
    head<48>(type);
    linear<1, 1, 1>(type);
    linear<2, 1, 1>(type);
    linear<2, 2, 1>(type);
    linear<2, 2, 2>(type);
    split_k<2>(type);
    split_k<4>(type);
    print<PortableLinearShape>("multiply_experts_portable", type, "", 2);
    std::printf("moments<%s> %d 0 1 1\n", type, 32 * kStatisticsWarps);
  }
  print<Float8Shape<1>>("multiply_float8", "1", "", 1);
  print<Float8Shape<2>>("multiply_float8", "2", "", 1);
  using Portable = PortableFloat8Shape;
  std::printf("multiply_float8_portable %d %d 2 1\n", Portable::kThreads, Portable::kBytes);
  std::printf("quantize %d 0 1 1\n", 32 * kQuantizeWarps);
}
