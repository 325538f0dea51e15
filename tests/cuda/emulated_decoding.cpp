// The kernels of decoding steps as a library for the CPU, cut into thread blocks as on a GPU.

#include "decode_attention.cuh"
#include "head_top_k.cuh"

namespace {

using namespace beit3_fast;
using cuda::DecodeAttention;
using cuda::HeadTopK;

void check_operands(const char* obstacle) {
  emulated::check(obstacle == nullptr, obstacle == nullptr ? "" : obstacle);
}

// Null, or what the kernel did wrong.
template <class Run>
const char* report(Run run) {
  static std::string fault;
  try {
    run();
    return nullptr;
  } catch (const emulated::Fault& own) {
    fault = own.what();
    return fault.c_str();
  }
}

}  // namespace

extern "C" const char* emulate_decode_attention(const DecodeAttention* op, int processors,
                                                int order, uint64_t seed) {
  return report([&] {
    check_operands(cuda::decode_obstacle(*op));
    cuda::with_decode_types(*op, [&](auto type, auto width) {
      constexpr int kHeadDim = decltype(width)::value;
      const auto launch = cuda::decode_launch<kHeadDim>(*op, processors);
      emulated::run({launch.blocks, launch.threads, launch.shared_bytes,
                     static_cast<emulated::Order>(order), seed},
                    [&] { cuda::attend_cached<decltype(type), kHeadDim>(launch.call); });
    });
  });
}

extern "C" const char* emulate_head_top_k(const HeadTopK* op, int order, uint64_t seed) {
  return report([&] {
    check_operands(cuda::head_obstacle(*op));
    const auto how = static_cast<emulated::Order>(order);
    cuda::with_head_types(*op, [&](auto type, auto rows) {
      constexpr int kRows = decltype(rows)::value;
      const auto launch = cuda::head_launch<kRows>(*op);
      emulated::run(
          {launch.blocks, cuda::HeadTileShape<kRows>::kThreads, launch.shared_bytes, how, seed},
          [&] { cuda::score_classes<decltype(type), kRows>(*op); });
    });
    const auto launch = cuda::join_launch(*op);
    emulated::run({launch.blocks, 32, launch.shared_bytes, how, seed},
                  [&] { cuda::join_classes<>(*op); });
  });
}
