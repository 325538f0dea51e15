// Checks operands of cached_attention and launches its kernel.

#include "decode_attention.cuh"

#include "launch.h"

namespace beit3_fast::cuda {

const char* decode_attention_obstacle(const DecodeAttention& op) { return decode_obstacle(op); }

const char* decode_attention(const DecodeAttention& op, CUstream_st* stream) {
  if (const char* obstacle = decode_obstacle(op)) return obstacle;
  if (op.num_sequences * op.num_rows * op.num_heads == 0) return nullptr;
  Device device;
  if (const char* error = ask(device)) return error;
  return with_decode_types(op, [&](auto type, auto width) {
    constexpr int kHeadDim = decltype(width)::value;
    const DecodeLaunch launch = decode_launch<kHeadDim>(op, device.processors);
    const Grid grid{launch.blocks, launch.threads, launch.shared_bytes, 1,
                    DecodeShape<kHeadDim>::kBytes};
    return enqueue(attend_cached<decltype(type), kHeadDim>, grid, stream, launch.call);
  });
}

}  // namespace beit3_fast::cuda
