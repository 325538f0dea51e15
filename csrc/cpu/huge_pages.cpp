#include "huge_pages.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#include "parallel.h"

namespace beit3_fast::cpu {
namespace {

// The last page of a block is rarely full, and what is not touched takes no room: large blocks.
constexpr int64_t kLastingBlock = 128 * kHugePage;
constexpr int64_t kPiece = 64;
constexpr int64_t kMostIdle = 64 * kHugePage;

// What many pieces lie in, one behind the other; places are bytes from its beginning.
struct Block {
  int64_t bytes;
  int64_t used;
  std::map<int64_t, int64_t> pieces;  // from where to where
};

struct Idle {
  void* data;
  int64_t bytes;
};

// Never destroyed: tensors may outlive everything else of this library.
struct Memory {
  std::mutex mutex;
  std::map<char*, Block> lasting;
  char* open = nullptr;  // the block that is being filled
  std::map<void*, int64_t> passing;
  std::vector<Idle> idle;  // the longest first
  int64_t idle_bytes = 0;

  Memory() {
#if defined(__linux__)
    // A fork in the middle of a call would leave the child a lock that nobody opens.
    pthread_atfork([] { memory().mutex.lock(); }, [] { memory().mutex.unlock(); },
                   [] { memory().mutex.unlock(); });
#endif
  }
  static Memory& memory() {
    static auto* const all = new Memory;
    return *all;
  }
};

std::size_t whole_pages(int64_t bytes) {
  return static_cast<std::size_t>(ceil_div(bytes, kHugePage) * kHugePage);
}

// Gives the system back what whole pages hold, not the addresses.
void empty_pages(char* begin, int64_t bytes) {
#if defined(__linux__)
  if (bytes > 0) madvise(begin, static_cast<std::size_t>(bytes), MADV_DONTNEED);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace

#if defined(__linux__)

// Not from the heap, which would hand out again what small pages hold already.
void* allocate_huge(int64_t bytes) {
  const std::size_t size = whole_pages(bytes), page = whole_pages(1);
  void* const all =
      mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  auto* const begin = static_cast<char*>(all);
  const std::size_t front = (page - reinterpret_cast<std::uintptr_t>(begin) % page) % page;
  if (front > 0) munmap(begin, front);
  munmap(begin + front + size, page - front);
  // A wish: small pages serve as well, and less than half of a huge one behind others is no waste.
  const auto half = static_cast<std::size_t>(kHugePage / 2);
  const std::size_t near = (static_cast<std::size_t>(bytes) + half) / page * page;
  madvise(begin + front, near > page ? near : page, MADV_HUGEPAGE);
  return begin + front;
}

void free_huge(void* data, int64_t bytes) { munmap(data, whole_pages(bytes)); }

#else

constexpr std::align_val_t kAlign{static_cast<std::size_t>(kHugePage)};

void* allocate_huge(int64_t bytes) { return ::operator new(whole_pages(bytes), kAlign); }

void free_huge(void* data, int64_t) { ::operator delete(data, kAlign); }

#endif

void* take_lasting(int64_t bytes) {
  const int64_t size = ceil_div(bytes, kPiece) * kPiece;
  Memory& all = Memory::memory();
  const std::lock_guard<std::mutex> lock(all.mutex);
  auto block = all.lasting.find(all.open);
  if (block == all.lasting.end() || block->second.used + size > block->second.bytes) {
    const int64_t whole = size > kLastingBlock ? size : kLastingBlock;
    all.open = static_cast<char*>(allocate_huge(whole));
    block = all.lasting.emplace(all.open, Block{whole, 0, {}}).first;
  }
  const int64_t from = block->second.used;
  block->second.used += size;
  block->second.pieces.emplace(from, block->second.used);
  return block->first + from;
}

void give_lasting(void* data) {
  Memory& all = Memory::memory();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = --all.lasting.upper_bound(static_cast<char*>(data));
  auto& [begin, block] = *found;
  const auto piece = block.pieces.find(static_cast<char*>(data) - begin);
  if (block.pieces.size() == 1) {
    free_huge(begin, block.bytes);
    all.lasting.erase(found);
    return;
  }
  // Its pages, but those which it shares with pieces that are there.
  const auto next = std::next(piece);
  const int64_t free_from = piece == block.pieces.begin() ? 0 : std::prev(piece)->second;
  const int64_t free_to = next == block.pieces.end() ? block.used : next->first;
  const int64_t from =
      std::max(ceil_div(free_from, kHugePage), piece->first / kHugePage) * kHugePage;
  const int64_t to = std::min(free_to / kHugePage, ceil_div(piece->second, kHugePage)) * kHugePage;
  block.pieces.erase(piece);
  empty_pages(begin + from, to - from);
}

void* take_passing(int64_t bytes) {
  Memory& all = Memory::memory();
  const std::lock_guard<std::mutex> lock(all.mutex);
  Idle taken{nullptr, static_cast<int64_t>(whole_pages(bytes))};
  auto best = all.idle.end();
  for (auto it = all.idle.begin(); it != all.idle.end(); ++it) {
    const bool fits = it->bytes >= taken.bytes && it->bytes <= 2 * taken.bytes;
    if (fits && (best == all.idle.end() || it->bytes < best->bytes)) best = it;
  }
  if (best != all.idle.end()) {
    taken = *best;
    all.idle.erase(best);
    all.idle_bytes -= taken.bytes;
  } else {
    taken.data = allocate_huge(bytes);
  }
  all.passing.emplace(taken.data, taken.bytes);
  return taken.data;
}

void give_passing(void* data) {
  Memory& all = Memory::memory();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto piece = all.passing.find(data);
  all.idle.push_back({data, piece->second});
  all.idle_bytes += piece->second;
  all.passing.erase(piece);
  while (all.idle_bytes > kMostIdle) {
    const Idle oldest = all.idle.front();
    all.idle.erase(all.idle.begin());
    all.idle_bytes -= oldest.bytes;
    free_huge(oldest.data, oldest.bytes);
  }
}

}  // namespace beit3_fast::cpu
