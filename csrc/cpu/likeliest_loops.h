// The highest of some logits and what all of them come to, see kernels.h.
#pragma once

#include "tile_loops.h"

namespace {

// The entries of a summary, best first; of equals the one that came first.
struct Best {
  LogitsSummary* out;
  int64_t wanted;

  bool takes(float score) const { return out->found < wanted || score > out->scores[wanted - 1]; }
  void put(float score, int64_t number) const {
    int64_t at = out->found < wanted ? out->found++ : wanted - 1;
    for (; at > 0 && score > out->scores[at - 1]; --at) {
      out->scores[at] = out->scores[at - 1];
      out->classes[at] = out->classes[at - 1];
    }
    out->scores[at] = score;
    out->classes[at] = number;
  }
};

template <class Arch>
void likeliest(const LogitsBlock& block, LogitsSummary* out) {
  constexpr float kLowest = -__builtin_inff();
  // Most blocks hold nothing that is worth a closer look.
  constexpr int64_t kVecs = 4, kBlock = 16 * kVecs;
  const auto* const logits = static_cast<const typename Arch::T*>(block.logits);
  const auto load = [&](int64_t at) {
    const int64_t left = block.count - at;
    if (left >= 16) return v_load(logits + at);
    return v_keep(v_load_n(logits + at, left > 0 ? left : 0), left > 0 ? left : 0, kLowest);
  };
  const Best best{out, block.wanted};
  Vec top = v_set(kLowest);
  out->found = 0;
  for (int64_t from = 0; from < block.count; from += kBlock) {
    Vec own[kVecs];
    Vec highest = v_set(kLowest);
    for (int j = 0; j < kVecs; ++j) {
      own[j] = load(from + 16 * j);
      highest = v_max(highest, own[j]);
    }
    top = v_max(top, highest);
    if (!best.takes(v_top(highest))) continue;
    float scores[kBlock];
    for (int j = 0; j < kVecs; ++j) v_store(scores + 16 * j, own[j]);
    const int64_t count = block.count - from < kBlock ? block.count - from : kBlock;
    for (int64_t i = 0; i < count; ++i) {
      const bool is_allowed = block.allowed == nullptr || block.allowed[from + i] != 0;
      if (is_allowed && best.takes(scores[i])) best.put(scores[i], block.first + from + i);
    }
  }
  out->top = v_top(top);
  out->sum = 0.0f;
  if (out->top == kLowest) {
    // Maxima may lose what is not a number; differences from -inf would be none.
    for (int64_t at = 0; at < block.count; at += 16) {
      const float every = v_sum(load(at));
      if (every != every) out->sum = every;
    }
    return;
  }
  const Vec shift = v_set(out->top), scale = v_set(1.4426950408889634f);
  Vec sum = v_zero();
  for (int64_t at = 0; at < block.count; at += 16) {
    sum = v_add(sum, v_exp2<6>(v_mul(v_sub(load(at), shift), scale)));
  }
  out->sum = v_sum(sum);
}

}  // namespace
