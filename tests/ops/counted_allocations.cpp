// Preloaded: counts what C++ code allocates in pieces of a page or more, and huge pages. PyTorch's
// tensors come from elsewhere (posix_memalign), Python's objects from smaller mappings.

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace {
std::atomic<long> large{0};
void count(std::size_t bytes) { large += bytes >= 4096; }
}  // namespace

extern "C" long large_allocations() { return large; }

void* operator new(std::size_t bytes) {
  count(bytes);
  if (void* const at = std::malloc(bytes)) return at;
  throw std::bad_alloc();
}

void* operator new(std::size_t bytes, std::align_val_t alignment) {
  count(bytes);
  const auto unit = static_cast<std::size_t>(alignment);
  if (void* const at = std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit)) return at;
  throw std::bad_alloc();
}

extern "C" void* mmap(void* at, std::size_t bytes, int protection, int flags, int file,
                      off_t offset) noexcept {
  large += bytes >= std::size_t{4} << 20;
  return reinterpret_cast<void*>(syscall(SYS_mmap, at, bytes, protection, flags, file, offset));
}

void operator delete(void* at) noexcept { std::free(at); }
void operator delete(void* at, std::align_val_t) noexcept { std::free(at); }
