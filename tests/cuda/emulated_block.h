// A thread block on the CPU: every thread is a fiber, and runs until it waits for something.
//
// Waiting threads are woken by what they wait for. Copies by the tensor memory accelerator are
// carried out at once, as late as possible (when no thread can go on), or at random moments: a
// kernel must be right in every order. A block in which nothing can go on has a deadlock, and that
// is a fault, like everything else that the PTX manual forbids or leaves open and that can be seen
// here.
//
// Blocks of a cluster run in turns: one as far as it can before the next, from the first or from
// the last on, or a thread of any of them at a time.
#pragma once

#include <ucontext.h>

#include <array>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace beit3_fast::emulated {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(bool holds, const char* fault) {
  if (!holds) throw Fault(fault);
}

// With words that are only put together where they are needed: most checks stand in inner loops.
template <class Describe, class = decltype(std::declval<Describe>()())>
void check(bool holds, Describe&& describe) {
  if (!holds) throw Fault(describe());
}

enum class Order { kEager, kLate, kRandom };

struct Launch {
  int grid = 1;
  int threads = 32;
  int shared_bytes = 0;
  Order order = Order::kEager;
  uint64_t seed = 0;
  int cluster = 1;  // blocks of a cluster
};

constexpr int kMaxSharedBytes = 232448;
constexpr int kRegisterFile = 65536;
constexpr size_t kStackBytes = 256 << 10;
// Where dynamic shared memory begins: at no multiple of what tiles must be aligned to.
constexpr uint32_t kSharedBase = 1024 + 48;

using Waiters = std::vector<int>;

struct MemoryBarrier {
  int expected = 0;
  int pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  int maker = 0;
  bool fenced = false;
  Waiters waiters;
};

struct NamedBarrier {
  int size = 0;
  int arrived = 0;
  Waiters waiters;
};

using LaneValue = std::array<uint32_t, 8>;

// Where the lanes of a warp meet and show each other values; two rounds' values are kept, as fast
// lanes may be one round ahead.
struct Warp {
  const char* instruction = nullptr;
  int arrived = 0;
  int round = 0;
  LaneValue values[2][32];
  Waiters waiters;
};

// Numbers of one or two bytes.
struct Format {
  int bytes;
  float (*number)(uint16_t);

  constexpr int in(int size) const { return size / bytes; }
};

struct Product {
  float* sums;
  int columns;
  bool transposed;
  const uint32_t* a_words;  // null: a lies in shared memory
  uint64_t a;
  uint64_t b;
  bool add;
  Format format;
  int group;
};

struct AsyncCopy {
  uint32_t to;
  const void* from;
  int real;
};

struct Thread {
  int index = 0;
  bool started = false;
  bool done = false;
  ucontext_t start;
  jmp_buf context;
  const char* waits_for = "its first turn";
  uint32_t waits_at = 0;
  int registers = 0;
  // Products under way, and what their sums were when the first was begun.
  std::vector<Product> products;
  std::map<float*, std::vector<float>> shadows;
  int groups = 0;
  bool fenced = false;
  size_t issued = 0;
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;
  std::vector<uint32_t> unfenced_chunks;
};

struct Block;
inline Block* block = nullptr;

// Blocks that run together, and where all their threads meet.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int arrived = 0;
  int ended = 0;  // threads
  uint32_t phase = 0;
  int meetings = 0;
  std::deque<std::function<void()>> stores;  // into other blocks, on their way

  Cluster(const Launch& launch, int first, const std::function<void()>& kernel);
  void run();
  void complete_phase();
  Block& running(int rank, const char* what);

 private:
  Block* next_block();
};

struct Block {
  const Launch launch;
  const int index;
  Cluster& cluster;
  const std::function<void()>& kernel;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  std::vector<uint8_t> unfenced;  // by 16 bytes: written by threads, and not fenced yet
  std::map<uint32_t, MemoryBarrier> barriers;
  NamedBarrier named[16];
  std::vector<std::vector<std::tuple<uint64_t, uint64_t, int, bool>>> issued;  // by warp group
  std::deque<std::function<void()>> copies;
  int free_registers = 0;  // of those that the block was given
  Waiters register_waiters;
  Waiters cluster_waiters;
  int ended = 0;  // threads
  std::deque<int> ready;
  int current = 0;
  std::mt19937_64 random;
  std::string fault;
  jmp_buf scheduler;

  Block(const Launch& launch, int index, Cluster& cluster, const std::function<void()>& kernel)
      : launch(launch),
        index(index),
        cluster(cluster),
        kernel(kernel),
        threads(launch.threads),
        warps((launch.threads + 31) / 32),
        shared(launch.shared_bytes, 0xff),
        unfenced(launch.shared_bytes / 16 + 2),
        issued((launch.threads + 127) / 128),
        random(launch.seed + index) {
    check(launch.threads % 32 == 0 && launch.threads <= 1024, "whole warps, at most 1024 threads");
    check(launch.shared_bytes <= kMaxSharedBytes,
          "more shared memory than a thread block may have");
    const int registers = std::min(255, kRegisterFile / launch.threads) / 8 * 8;
    for (int i = 0; i < launch.threads; ++i) {
      threads[i].index = i;
      threads[i].registers = registers;
      ready.push_back(i);
    }
  }

  Thread& self() { return threads[current]; }
  int rank() const { return index % launch.cluster; }
  bool has_ended() const { return ended == launch.threads; }
  Warp& warp() { return warps[current / 32]; }
  bool chance(int of) { return random() % of == 0; }

  uint8_t* at(uint32_t address, uint32_t bytes) {
    check(address >= kSharedBase && address + bytes <= kSharedBase + shared.size(),
          [&] { return "an address outside shared memory: " + std::to_string(address); });
    return shared.data() + (address - kSharedBase);
  }

  void wake(Waiters& waiters) {
    for (const int thread : waiters) ready.push_back(thread);
    waiters.clear();
  }

  __attribute__((noinline)) void wait(Waiters& waiters, const char* what, uint32_t which = 0) {
    self().waits_for = what;
    self().waits_at = which;
    waiters.push_back(current);
    if (_setjmp(self().context) == 0) _longjmp(scheduler, 1);
  }

  void step();
  void check_end() const;

 private:
  static void enter();
  void resume(int thread, char* stack);
  void finish_thread();
  void deliver();
  int next_thread();
  std::string who_waits() const;
};

inline void Block::finish_thread() {
  check(self().products.empty(), "a thread ended with products under way");
  check(self().copy_groups.empty() && self().open_copies.empty(),
        "a thread ended with copies under way");
}

inline void Block::enter() {
  try {
    block->kernel();
    block->finish_thread();
  } catch (const std::exception& error) {
    block->fault = "thread " + std::to_string(block->current) + ": " + error.what();
  }
  block->self().done = true;
  ++block->ended;
  ++block->cluster.ended;
  block->cluster.complete_phase();
  _longjmp(block->scheduler, 1);
}

inline void Block::resume(int thread, char* stack) {
  current = thread;
  if (_setjmp(scheduler) != 0) return;
  if (self().started) _longjmp(self().context, 1);
  self().started = true;
  getcontext(&self().start);
  self().start.uc_stack.ss_sp = stack;
  self().start.uc_stack.ss_size = kStackBytes;
  self().start.uc_link = nullptr;
  makecontext(&self().start, enter, 0);
  setcontext(&self().start);
}

inline void Block::deliver() {
  check(launch.cluster == 1 || !has_ended(), "a copy comes to a block that has ended");
  const size_t which = launch.order == Order::kRandom ? random() % copies.size() : 0;
  const auto copy = std::move(copies[which]);
  copies.erase(copies.begin() + static_cast<ptrdiff_t>(which));
  copy();
}

inline int Block::next_thread() {
  if (launch.order == Order::kRandom) std::swap(ready[0], ready[random() % ready.size()]);
  const int thread = ready.front();
  ready.pop_front();
  return thread;
}

inline std::string Block::who_waits() const {
  std::map<std::string, int> reasons;
  for (const Thread& thread : threads) {
    if (!thread.done) ++reasons[thread.waits_for + (" " + std::to_string(thread.waits_at))];
  }
  std::string all;
  for (const auto& [reason, count] : reasons)
    all += "; " + std::to_string(count) + " threads wait for " + reason;
  return all;
}

// Carries out a copy, or runs a thread until it waits.
inline void Block::step() {
  static std::vector<std::unique_ptr<char[]>> stacks;
  const size_t first = rank() * threads.size();
  while (stacks.size() < first + threads.size()) stacks.emplace_back(new char[kStackBytes]);
  block = this;
  const bool now = launch.order == Order::kRandom && chance(16);
  try {
    if (!copies.empty() && (ready.empty() || now)) {
      deliver();
    } else {
      const int thread = next_thread();
      resume(thread, stacks[first + thread].get());
    }
  } catch (const Fault& error) {
    fault = error.what();
  }
}

inline void Block::check_end() const {
  const std::string where = "block " + std::to_string(index) + ": ";
  check(fault.empty(), [&] { return where + fault; });
  const std::string waiting = who_waits();
  check(waiting.empty(), [&] { return where + "deadlock" + waiting; });
  for (const NamedBarrier& barrier : named)
    check(barrier.arrived == 0, [&] { return where + "a named barrier was left half full"; });
}

inline Cluster::Cluster(const Launch& launch, int first, const std::function<void()>& kernel) {
  check(launch.cluster > 0 && launch.cluster <= 8 && launch.grid % launch.cluster == 0,
        "a grid of whole clusters of at most 8 blocks");
  for (int i = 0; i < launch.cluster; ++i)
    blocks.push_back(std::make_unique<Block>(launch, first + i, *this, kernel));
}

// The block of that rank, whose shared memory may be reached only while it runs.
inline Block& Cluster::running(int rank, const char* what) {
  check(rank >= 0 && rank < static_cast<int>(blocks.size()), "no such block in the cluster");
  check(!blocks[rank]->has_ended(),
        [&] { return std::string(what) + " to a block that has ended"; });
  return *blocks[rank];
}

// All threads that have not ended have arrived.
inline void Cluster::complete_phase() {
  const int all = static_cast<int>(blocks.size()) * blocks[0]->launch.threads;
  if (arrived == 0 || arrived + ended < all) return;
  arrived = 0;
  phase ^= 1;
  ++meetings;
  for (const auto& store : stores) store();
  stores.clear();
  for (const auto& own : blocks) own->wake(own->cluster_waiters);
}

// Copies are last where no thread can go on.
inline Block* Cluster::next_block() {
  std::vector<Block*> able;
  for (const auto& own : blocks) {
    if (!own->ready.empty()) able.push_back(own.get());
  }
  for (const auto& own : blocks) {
    if (able.empty() && !own->copies.empty()) return own.get();
  }
  if (able.empty()) return nullptr;
  const Order order = blocks[0]->launch.order;
  if (order == Order::kRandom) return able[blocks[0]->random() % able.size()];
  return order == Order::kEager ? able.front() : able.back();
}

inline void Cluster::run() {
  while (Block* own = next_block()) {
    own->step();
    if (!own->fault.empty()) own->check_end();
  }
  for (const auto& own : blocks) own->check_end();
  check(stores.empty(), "a store to another block that nothing waited for");
}

// Runs the clusters of a grid one after the other. Throws Fault.
inline void run(const Launch& launch, const std::function<void()>& kernel) {
  for (int i = 0; i < launch.grid; i += launch.cluster) Cluster(launch, i, kernel).run();
}

}  // namespace beit3_fast::emulated
