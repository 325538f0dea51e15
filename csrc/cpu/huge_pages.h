// Memory in pages of 2 MB, where the system gives them (Linux: madvise): tiles walk through a
// megabyte of weights in less time than it takes to look up its 256 small pages.
#pragma once

#include <cstdint>

namespace beit3_fast::cpu {

constexpr int64_t kHugePage = int64_t{2} << 20;

// New memory that begins at a huge page; throws std::bad_alloc. What is never touched takes no
// room.
void* allocate_huge(int64_t bytes);
void free_huge(void* data, int64_t bytes);

// The rest begins at a multiple of 64 bytes, throws std::bad_alloc, and may be called by any
// thread.

// For what is kept for long, weights above all: many of them lie in one block of huge pages. Pages
// are given back with the last one in them, the block with the last one in it.
void* take_lasting(int64_t bytes);
void give_lasting(void* data);

// For what the next call wants again, rows between kernels above all: the next take of about as
// much gets it.
void* take_passing(int64_t bytes);
void give_passing(void* data);

}  // namespace beit3_fast::cpu
