// Checks operands of shared_attention and launches the kernel of the device's architecture.

#include "shared_attention.h"

#include "attention_plan.cuh"
#include "launch.h"
#include "portable_attention.cuh"

namespace beit3_fast::cuda {
inline namespace attention_launcher {

const char* launch_portable(const SharedAttention& op, CUstream_st* stream) {
  return with_types(op, [&](auto type, auto width) {
    constexpr int kHeadDim = decltype(width)::value;
    const AttentionLaunch launch = portable_launch<PortableShape<kHeadDim>>(op);
    return enqueue(attend_portable<decltype(type), kHeadDim>,
                   {launch.blocks, launch.threads, launch.shared_bytes}, stream, launch.call);
  });
}

}  // namespace attention_launcher

const char* shared_attention_obstacle(const SharedAttention& op) { return attention_obstacle(op); }

const char* shared_attention(const SharedAttention& op, CUstream_st* stream) {
  if (const char* obstacle = attention_obstacle(op)) return obstacle;
  if (op.num_queries == 0) return nullptr;
  Device device;
  if (const char* error = ask(device)) return error;
  if (device.hopper && launch_hopper_attention != nullptr) {
    return launch_hopper_attention(op, device.processors, stream);
  }
  if (op.rounded != nullptr) return "leaves 8 bits on compute capability 9.0 only";
  return launch_portable(op, stream);
}

}  // namespace beit3_fast::cuda
