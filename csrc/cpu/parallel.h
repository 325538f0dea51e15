// Work sharing on somebody else's threads, and scratch memory that belongs to each of them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>

#include "huge_pages.h"

namespace beit3_fast::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A thread pool as the binding layer offers it: run(n, body, context) calls body(i, context) for
// every i in [0, n), each from any one thread, and returns when all are done.
struct Pool {
  int64_t threads;
  void (*run)(int64_t count, void (*body)(int64_t index, void* context), void* context);
};

// Calls task(i) for i in [0, count): each thread takes the next one when it is free, so uneven
// tasks and busy cores balance out. What a task throws ends the call, once all threads are back:
// pools pass no exception on as it is.
template <class Task>
void share(const Pool& pool, int64_t count, const Task& task) {
  if (count <= 0) return;
  const int64_t workers = pool.threads < count ? pool.threads : count;
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct Shared {
    const Task* task;
    int64_t count;
    std::atomic<int64_t> next;
    std::atomic<bool> failed;
    std::exception_ptr error;
  } shared{&task, count, {0}, {false}, nullptr};
  pool.run(
      workers,
      [](int64_t, void* context) {
        auto& state = *static_cast<Shared*>(context);
        try {
          while (!state.failed.load(std::memory_order_relaxed)) {
            const int64_t i = state.next.fetch_add(1, std::memory_order_relaxed);
            if (i >= state.count) return;
            (*state.task)(i);
          }
        } catch (...) {
          if (!state.failed.exchange(true)) state.error = std::current_exception();
        }
      },
      &shared);
  if (shared.error != nullptr) std::rethrow_exception(shared.error);
}

// Memory that grows and is kept, aligned to pages; in huge ones where it is much. Contents do not
// survive a growth.
class Scratch {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > size()) {
      data_.reset();
      void* const fresh = bytes >= kHugeFrom
                              ? allocate_huge(bytes)
                              : ::operator new(static_cast<std::size_t>(bytes), kAlign);
      data_ = {fresh, Delete{bytes}};
    }
    return data_.get();
  }

  void keep_at_most(int64_t bytes) {
    if (size() > bytes) data_.reset();
  }

 private:
  static constexpr std::align_val_t kAlign{4096};
  static constexpr int64_t kHugeFrom = kHugePage / 4;
  struct Delete {
    int64_t bytes;
    void operator()(void* p) const {
      if (bytes >= kHugeFrom) {
        free_huge(p, bytes);
      } else {
        ::operator delete(p, kAlign);
      }
    }
  };
  int64_t size() const { return data_ == nullptr ? 0 : data_.get_deleter().bytes; }

  std::unique_ptr<void, Delete> data_{nullptr, Delete{0}};
};

// What a task of `share` works in, whatever op it belongs to: a thread runs one at a time.
inline Scratch& task_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace beit3_fast::cpu
