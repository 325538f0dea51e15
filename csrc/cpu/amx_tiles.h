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
  }

 private:
  int64_t rows_ = 0;
};

// The rest of an Arch (tile_loops.h) whose units are multiplied by tiles; Dot::add<I>() adds to sum
// I the product of its A and B.
template <class Base, class Dot>
struct OfAmx : Base {
  static constexpr int kTileRows = kAmxRows;
  static constexpr bool kEven = false;
  using State = Tiles;

  static int64_t vectors_at_once(int64_t, int64_t columns) { return columns <= 16 ? 1 : 2; }

  static void product(Tiles& tiles, int64_t rows, int64_t vectors, const uint32_t* a,
                      const uint32_t* b, int64_t, int64_t units, float* c, int64_t c_stride,
                      bool more, Ahead) {
    const int64_t chunks = ceil_div(units, kChunk);
    multiply<false>(tiles, rows, vectors, a, b, chunks, chunks, more ? c : nullptr, c, c_stride,
                    [] {});
  }

  // Rows of A times so many vectors of B, added to `before` where that is not null; beside() is
  // called with every chunk. With kPast the loads of A go past L1, which then keeps the first
  // `near` chunks of B; those of the others go past it as well.
  template <bool kPast, class Beside>
  static void multiply(Tiles& tiles, int64_t rows, int64_t vectors, const uint32_t* a,
                       const uint32_t* b, int64_t chunks, int64_t near, const float* before,
                       float* c, int64_t c_stride, const Beside& beside) {
    tiles.set_rows(rows);
    const auto run = rows > 16 ? (vectors == 1 ? multiply_tiles<2, 1, kPast, Beside>
                                               : multiply_tiles<2, 2, kPast, Beside>)
                               : (vectors == 1 ? multiply_tiles<1, 1, kPast, Beside>
                                               : multiply_tiles<1, 2, kPast, Beside>);
    run(rows, a, b, chunks, near, before, c, c_stride, beside);
  }

  // M tiles of rows and N of columns.
  template <int M, int N, bool kPast, class Beside>
  static void multiply_tiles(int64_t rows, const uint32_t* a, const uint32_t* b, int64_t chunks,
                             int64_t near, const float* before, float* c, int64_t c_stride,
                             const Beside& beside) {
    constexpr int64_t kRowWords = Base::kRowWords, kARow = kRowWords * 4, kBRow = kPanel * 4;
    const int64_t c_row = c_stride * 4, lower = 16 * c_stride;
    memory_is_read();
    if (before != nullptr) {
      _tile_loadd(0, before, c_row);
      if (N == 2) _tile_loadd(1, before + 16, c_row);
      if (M == 2) _tile_loadd(2, before + lower, c_row);
      if (M == 2 && N == 2) _tile_loadd(3, before + lower + 16, c_row);
    } else {
      _tile_zero(0);
      if (N == 2) _tile_zero(1);
      if (M == 2) _tile_zero(2);
      if (M == 2 && N == 2) _tile_zero(3);
    }
    for (int64_t k = 0; k < chunks; ++k, a += rows * kRowWords, b += kChunk * kPanel) {
      const bool b_past = kPast && k >= near;
      if (kPast) {
        _tile_stream_loadd(4, a, kARow);
      } else {
        _tile_loadd(4, a, kARow);
      }
      if (b_past) {
        _tile_stream_loadd(6, b, kBRow);
      } else {
        _tile_loadd(6, b, kBRow);
      }
      Dot::template add<0>();
      if (N == 2) {
        if (b_past) {
          _tile_stream_loadd(7, b + 16, kBRow);
        } else {
          _tile_loadd(7, b + 16, kBRow);
        }
        Dot::template add<1>();
      }
      if (M == 2) {
        if (kPast) {
          _tile_stream_loadd(5, a + 16 * kRowWords, kARow);
        } else {
          _tile_loadd(5, a + 16 * kRowWords, kARow);
        }
        Dot::template add<2>();
        if (N == 2) Dot::template add<3>();
      }
      beside();
    }
    _tile_stored(0, c, c_row);
    if (N == 2) _tile_stored(1, c + 16, c_row);
    if (M == 2) _tile_stored(2, c + lower, c_row);
    if (M == 2 && N == 2) _tile_stored(3, c + lower + 16, c_row);
    memory_is_read();
  }
};

}  // namespace
