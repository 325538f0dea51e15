// Blocks of a cluster: copies to all of them, and threads that arrive and store in each other's.
#pragma once

#include "emulator_checks_8_bits.h"
#include "hopper.cuh"

namespace beit3_fast::emulator_checks {

using namespace beit3_fast::cuda;

struct ClusterMistakes {
  bool begins_alone = false;
  bool ends_alone = false;
  bool free_after_one_block = false;
  bool half_of_the_bytes = false;
};

// Both blocks load 32 of 64 rows for both, through one slot, in turns of K, and add up the words at
// the beginning of all rows. What each of them found.
inline std::vector<std::vector<double>> rows_of_both(const std::vector<uint16_t>& data, int columns,
                                                     emulated::Order order,
                                                     const ClusterMistakes& mistakes = {}) {
  constexpr int kRowBytes = 128, kHalf = 32 * kRowBytes;
  TensorMap map;
  make_tensor_map(map,
                  {data.data(), 3, {columns, 64, 1}, {2 * columns, 128 * columns}, {64, 32, 1}});
  std::vector<std::vector<double>> found(2, std::vector<double>(64));
  emulated::run({2, 96, kTileAlignment + 2 * kHalf + 16, order, 5, 2}, [&] {
    const uint32_t slot = shared_memory(kTileAlignment), full = slot + 2 * kHalf, free = full + 8;
    if (thread_index() == 0) {
      barrier_init(full, 1);
      barrier_init(free, mistakes.free_after_one_block ? 64 : 128);
      fence_barrier_init();
    }
    if (mistakes.begins_alone) {
      sync_block();
    } else {
      sync_cluster();
    }
    for (int k = 0; k < columns / 64; ++k) {
      if (thread_index() == 64) {
        barrier_wait(free, k % 2 ^ 1);
        barrier_expect(full, mistakes.half_of_the_bytes ? kHalf : 2 * kHalf);
        tma_multicast_3d(slot + cluster_rank() * kHalf, map, full, k * 64, cluster_rank() * 32, 0,
                         3);
      } else if (thread_index() < 64) {
        barrier_wait(full, k % 2);
        const int row = thread_index();
        found[cluster_rank()][row] +=
            load_shared(slot + row * kRowBytes + row % 8 * 16) * (k + 1.0);
        for (int rank = 0; rank < 2; ++rank) barrier_arrive_in_cluster(free, rank);
      }
    }
    if (!mistakes.ends_alone) sync_cluster();
  });
  return found;
}

// What is seen of such mistakes, in all orders.
inline std::string seen_in_cluster(const ClusterMistakes& mistakes) {
  constexpr int kColumns = 64 * 5;
  std::vector<uint16_t> data(64 * kColumns);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint16_t>(0x3f00 + i * 37 % 251);
  std::vector<double> sums(64);
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < kColumns / 64; ++k) {
      float value;
      std::memcpy(&value, data.data() + row * kColumns + k * 64, 4);
      sums[row] += value * (k + 1.0);
    }
  }
  std::string seen;
  for (const auto order :
       {emulated::Order::kEager, emulated::Order::kLate, emulated::Order::kRandom}) {
    try {
      for (const auto& own : rows_of_both(data, kColumns, order, mistakes)) {
        if (own != sums) seen += "wrong numbers; ";
      }
    } catch (const emulated::Fault& fault) {
      seen += fault.what() + std::string("; ");
    }
  }
  return seen;
}

inline void clusters_share_copies() {
  const std::string seen = seen_in_cluster({});
  expect(seen.empty(), seen.c_str());
}

inline void mistakes_of_clusters_show() {
  const auto must_show = [](const ClusterMistakes& mistakes, const char* words) {
    const std::string seen = seen_in_cluster(mistakes);
    expect(seen.find(words) != std::string::npos, ("seen instead: " + seen).c_str());
  };
  ClusterMistakes mistakes;
  mistakes.begins_alone = true;
  must_show(mistakes, "was not made");
  mistakes = {};
  mistakes.ends_alone = true;
  must_show(mistakes, "to a block that has ended");
  mistakes = {};
  mistakes.free_after_one_block = true;
  must_show(mistakes, "more arrivals than it was made for");
  mistakes = {};
  mistakes.half_of_the_bytes = true;
  must_show(mistakes, "deadlock");
}

struct StoreMistakes {
  bool begins_alone = false;
  bool reads_at_once = false;
  bool ends_alone = false;
  bool maps_nothing = false;
  bool stores_last = false;
};

// Every block tells every other one, and itself, four numbers; what is wrong about what they find.
inline std::string seen_of_stores(emulated::Order order, const StoreMistakes& mistakes) {
  constexpr int kBlocks = 4;
  std::string seen;
  emulated::run({kBlocks, 32, 16 * kBlocks + 64, order, 7, kBlocks}, [&] {
    const uint32_t memory = shared_memory(16);
    const int own = cluster_rank();
    if (!mistakes.begins_alone) sync_cluster();
    if (thread_index() < kBlocks) {
      const float numbers[4] = {own + 1.0f, own + 2.0f, own + 3.0f, own + 4.0f};
      const uint32_t there = in_cluster(memory + 16 * own, thread_index());
      store_four_in_cluster(mistakes.maps_nothing ? memory : there, numbers);
    }
    if (mistakes.ends_alone) return;
    if (!mistakes.reads_at_once) sync_cluster();
    float found[4] = {};
    const int from = thread_index() % kBlocks;
    load_four_shared(found, memory + 16 * from);
    for (int i = 0; i < 4; ++i) {
      if (found[i] != from + 1.0f + i) seen = "wrong numbers; ";
    }
    if (mistakes.reads_at_once) sync_cluster();
    if (mistakes.stores_last) store_two_in_cluster(in_cluster(memory, own), 0.0f, 0.0f);
  });
  return seen;
}

inline std::string seen_of_stores(const StoreMistakes& mistakes) {
  std::string seen;
  for (const auto order :
       {emulated::Order::kEager, emulated::Order::kLate, emulated::Order::kRandom}) {
    try {
      seen += seen_of_stores(order, mistakes);
    } catch (const emulated::Fault& fault) {
      seen += fault.what() + std::string("; ");
    }
  }
  return seen;
}

inline void stores_reach_other_blocks() {
  const std::string seen = seen_of_stores({});
  expect(seen.empty(), seen.c_str());
}

inline void mistakes_of_stores_show() {
  const auto must_show = [](const StoreMistakes& mistakes, const char* words) {
    const std::string seen = seen_of_stores(mistakes);
    expect(seen.find(words) != std::string::npos, ("seen instead: " + seen).c_str());
  };
  StoreMistakes mistakes;
  mistakes.begins_alone = true;
  must_show(mistakes, "that may not have begun");
  mistakes = {};
  mistakes.reads_at_once = true;
  must_show(mistakes, "wrong numbers");
  mistakes = {};
  mistakes.ends_alone = true;
  must_show(mistakes, "to a block that has ended");
  mistakes = {};
  mistakes.stores_last = true;
  must_show(mistakes, "that nothing waited for");
  mistakes = {};
  mistakes.maps_nothing = true;
  must_show(mistakes, "not mapped to a block");
}

}  // namespace beit3_fast::emulator_checks
