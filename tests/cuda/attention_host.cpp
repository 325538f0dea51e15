// shared_attention's CUDA kernels as a library for the CPU, its kernels chosen and cut as on a GPU.

#include "attention_hopper.cuh"
#include "portable_attention.cuh"

namespace {

using namespace beit3_fast;
using cuda::AttentionLaunch;
using cuda::SharedAttention;

std::string last_fault;

template <class Kernel>
void run(const AttentionLaunch& launch, int order, uint64_t seed, Kernel kernel) {
  emulated::run({launch.blocks, launch.threads, launch.shared_bytes,
                 static_cast<emulated::Order>(order), seed},
                kernel);
}

void attend(const SharedAttention& op, int processors, bool portable, int order, uint64_t seed) {
  cuda::AttentionMaps maps;
  const char* obstacle = cuda::attention_obstacle(op);
  if (obstacle == nullptr) obstacle = cuda::map_operands(maps, op);
  emulated::check(obstacle == nullptr, obstacle == nullptr ? "" : obstacle);
  cuda::with_types(op, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int kHeadDim = decltype(width)::value;
    if (portable) {
      const auto launch = cuda::portable_launch<cuda::PortableShape<kHeadDim>>(op);
      run(launch, order, seed, [&] { cuda::attend_portable<T, kHeadDim>(launch.call); });
      return;
    }
    cuda::with_hopper_kernel<T, kHeadDim>(
        op, processors, [&](auto kernel, const AttentionLaunch& launch) {
          run(launch, order, seed, [&] { kernel(maps, launch.call); });
        });
  });
}

}  // namespace

// Null, or what the kernel did wrong.
extern "C" const char* emulate_shared_attention(const SharedAttention* op, int processors,
                                                int portable, int order, uint64_t seed) {
  try {
    attend(*op, processors, portable != 0, order, seed);
    return nullptr;
  } catch (const emulated::Fault& fault) {
    last_fault = fault.what();
    return last_fault.c_str();
  }
}
