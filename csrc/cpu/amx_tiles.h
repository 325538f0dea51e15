// AMX tile products: 32 rows of A and a panel of B in eight registers.
#pragma once

#include "tile_loops.h"

namespace {

constexpr int kAmxRows = 32;

// Tile registers: sums 0 to 3 (two tiles of rows, two halves of a panel), A 4 and 5, B 6 and 7.
struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

// Tile intrinsics of GCC 12 do not tell the compiler all of the memory that they read and write.
inline void memory_is_read() { __asm__ volatile("" ::: "memory"); }

// The tile registers of this thread, configured for some number of rows; released at the end, since
// an open configuration makes every switch of threads dearer.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (rows_ > 0) _tile_release();
  }
  void set_rows(int64_t rows) {
    if (rows == rows_) return;
    TileConfig config;
    const auto upper = static_cast<uint8_t>(min_of(rows, 16));
    const auto lower = static_cast<uint8_t>(max_of(rows - 16, 1));
    config.rows[0] = config.rows[1] = config.rows[4] = upper;
    config.rows[2] = config.rows[3] = config.rows[5] = lower;
    config.rows[6] = config.rows[7] = 16;
    memory_is_read();
    _tile_loadconfig(&config);
    rows_ = rows;
    held_a = nullptr;
  }

  // The tile of A whose products can begin with what the registers of A and B hold; null: none.
  const uint32_t* held_a = nullptr;

 private:
  int64_t rows_ = 0;
};

template <int M, int N>
inline void load_sums(const float* c, int64_t c_stride) {
  const int64_t row = c_stride * 4, lower = 16 * c_stride;
  _tile_loadd(0, c, row);
  if (N == 2) _tile_loadd(1, c + 16, row);
  if (M == 2) _tile_loadd(2, c + lower, row);
  if (M == 2 && N == 2) _tile_loadd(3, c + lower + 16, row);
}

template <int M, int N>
inline void zero_sums() {
  _tile_zero(0);
  if (N == 2) _tile_zero(1);
  if (M == 2) _tile_zero(2);
  if (M == 2 && N == 2) _tile_zero(3);
}

template <int M, int N>
inline void store_sums(float* c, int64_t c_stride) {
  const int64_t row = c_stride * 4, lower = 16 * c_stride;
  _tile_stored(0, c, row);
  if (N == 2) _tile_stored(1, c + 16, row);
  if (M == 2) _tile_stored(2, c + lower, row);
  if (M == 2 && N == 2) _tile_stored(3, c + lower + 16, row);
}

// Of A the upper tile or the lower one, of B the left one or the right one; past L1 with `past`.
template <bool kLower>
inline void load_a(const uint32_t* a, int64_t row, bool past) {
  if (kLower) {
    if (past) {
      _tile_stream_loadd(5, a, row);
    } else {
      _tile_loadd(5, a, row);
    }
  } else if (past) {
    _tile_stream_loadd(4, a, row);
  } else {
    _tile_loadd(4, a, row);
  }
}
template <bool kRight>
inline void load_b(const uint32_t* b, bool past) {
  constexpr int64_t row = kPanel * 4;
  if (kRight) {
    if (past) {
      _tile_stream_loadd(7, b, row);
    } else {
      _tile_loadd(7, b, row);
    }
  } else if (past) {
    _tile_stream_loadd(6, b, row);
  } else {
    _tile_loadd(6, b, row);
  }
}

// Those from L2 and from L1 in turn.
template <int M, int N>
inline void load_operands(const uint32_t* a, int row_words, const uint32_t* b, bool a_past,
                          bool b_past) {
  load_a<false>(a, row_words * 4, a_past);
  load_b<false>(b, b_past);
  if (M == 2) load_a<true>(a + 16 * row_words, row_words * 4, a_past);
  if (N == 2) load_b<true>(b + 16, b_past);
}

template <int M, int N, class Dot>
inline void add_products() {
  Dot::template add<0>();
  if (N == 2) Dot::template add<1>();
  if (M == 2) Dot::template add<2>();
  if (M == 2 && N == 2) Dot::template add<3>();
}

// A chunk of A, kRowWords words a row, times kChunkWords words of B; Dot::add<I>() adds to sum I
// the product of its A and B. load() is what comes before the first products of a chunk: it happens
// as early as the registers allow, behind the last products of the chunk before, for L2 is far.
template <class Dot>
struct OneProduct {
  static constexpr int kRowWords = 16;
  static constexpr int64_t kChunkWords = kChunk * kPanel, kSteps = 1;

  template <int M, int N>
  static void load(const uint32_t* a, const uint32_t* b, bool a_past, bool b_past) {
    load_operands<M, N>(a, kRowWords, b, a_past, b_past);
  }

  template <int M, int N, class LoadNext, class Beside>
  static void add(const uint32_t*, const uint32_t*, bool, bool, const LoadNext& load_next,
                  const Beside& beside) {
    add_products<M, N, Dot>();
    load_next();
    beside();
  }
};

// The rest of an Arch (tile_loops.h) whose chunks are multiplied by tiles, and what of them stays
// in L1 and L2 (amx_linear_loops.h): the most rows of a block and bytes of their slice, chunks of a
// depth that is not sliced, of a slice, of a block of B, and of a slice that is not cut into
// blocks. Sums that wait in memory cost more than rows that take a little more room, or than what
// of B finds none in L1. kConverts: whether B, kPerPackedUnit elements a unit, is converted by
// convert() before it is multiplied.
template <class Base, class Product>
struct OfAmx : Base {
  static constexpr int kTileRows = kAmxRows;
  static constexpr int kRowWords = Product::kRowWords;
  static constexpr int64_t kChunkWords = Product::kChunkWords, kSteps = Product::kSteps;
  static constexpr bool kEven = false;
  static constexpr int kPerPackedUnit = Base::kPerUnit;
  static constexpr bool kConverts = false;
  static constexpr int64_t kMostRows = 512, kSliceBytes = int64_t{800} << 10;
  static constexpr int64_t kWholeSlice = 32, kSlice = 24, kBlockOfB = 16, kUncut = 24;
  using State = Tiles;

  static int64_t vectors_at_once(int64_t, int64_t columns) { return columns <= 16 ? 1 : 2; }

  static void product(Tiles& tiles, int64_t rows, int64_t vectors, const uint32_t* a,
                      const uint32_t* b, int64_t, int64_t units, float* c, int64_t c_stride,
                      bool more, Ahead) {
    const int64_t chunks = ceil_div(units, kChunk);
    multiply<false>(tiles, rows, vectors, a, b, chunks, chunks, more ? c : nullptr, c, c_stride,
                    nullptr, [] {});
  }

  // Rows of A times so many vectors of B, added to `before` where that is not null; beside() is
  // called kSteps times with every chunk. With kPast the loads of A go past L1, which then keeps
  // the first `near` chunks of B; those of the others go past it as well. If `next_a` is not null,
  // the next call is for it, with as many rows and the same B.
  template <bool kPast, class Beside>
  static void multiply(Tiles& tiles, int64_t rows, int64_t vectors, const uint32_t* a,
                       const uint32_t* b, int64_t chunks, int64_t near, const float* before,
                       float* c, int64_t c_stride, const uint32_t* next_a, const Beside& beside) {
    tiles.set_rows(rows);
    const auto run = rows > 16 ? (vectors == 1 ? multiply_tiles<2, 1, kPast, Beside>
                                               : multiply_tiles<2, 2, kPast, Beside>)
                               : (vectors == 1 ? multiply_tiles<1, 1, kPast, Beside>
                                               : multiply_tiles<1, 2, kPast, Beside>);
    run(tiles, rows, a, b, chunks, near, before, c, c_stride, next_a, beside);
  }

  // M tiles of rows and N of columns.
  template <int M, int N, bool kPast, class Beside>
  static void multiply_tiles(Tiles& tiles, int64_t rows, const uint32_t* a, const uint32_t* b,
                             int64_t chunks, int64_t near, const float* before, float* c,
                             int64_t c_stride, const uint32_t* next_a, const Beside& beside) {
    const uint32_t* const first_b = b;
    memory_is_read();
    if (tiles.held_a != a && chunks > 0) Product::template load<M, N>(a, b, kPast, false);
    tiles.held_a = next_a;
    if (before != nullptr) {
      load_sums<M, N>(before, c_stride);
    } else {
      zero_sums<M, N>();
    }
    for (int64_t k = 1; k < chunks; ++k, a += rows * kRowWords, b += kChunkWords) {
      const auto load_next = [&] {
        Product::template load<M, N>(a + rows * kRowWords, b + kChunkWords, kPast,
                                     kPast && k >= near);
      };
      Product::template add<M, N>(a, b, kPast, kPast && k > near, load_next, beside);
    }
    const auto load_next = [&] {
      if (next_a != nullptr) Product::template load<M, N>(next_a, first_b, kPast, false);
    };
    if (chunks > 0) {
      Product::template add<M, N>(a, b, kPast, kPast && chunks > near, load_next, beside);
    }
    store_sums<M, N>(c, c_stride);
    memory_is_read();
  }
};

}  // namespace
