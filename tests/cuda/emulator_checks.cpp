// What the emulator must compute, and what it must not let pass: small kernels, right ones and
// faulty ones.
//
//   emulator_checks NAME     exit status 0 and nothing written, or 1 and what is wrong

#include <cstdio>
#include <random>

#include "emulator_checks_8_bits.h"
#include "emulator_checks_clusters.h"
#include "hopper.cuh"

namespace {

using namespace beit3_fast;
using namespace beit3_fast::cuda;
using namespace beit3_fast::emulator_checks;
using emulated::Fault;
using emulated::Launch;
using emulated::Order;

constexpr int kRows = 64, kColumns = 128, kDepth = 64, kRowBytes = 128;
constexpr Order kOrders[] = {Order::kEager, Order::kLate, Order::kRandom};

struct Matrix {
  int rows, columns, stride;
  std::vector<uint16_t> data;

  Matrix(int rows, int columns, int seed)
      : rows(rows), columns(columns), stride((columns + 7) / 8 * 8), data(rows * stride, 0x7fff) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c)
        data[r * stride + c] = emulated::bfloat16_bits(normal(random));
    }
  }

  float at(int row, int column) const {
    return row < rows && column < columns ? emulated::bfloat16_number(data[row * stride + column])
                                          : 0.0f;
  }

  TensorMap map(int box_rows) const {
    TensorMap map;
    const char* obstacle =
        make_tensor_map(map, {data.data(), 2, {columns, rows}, {2 * stride}, {64, box_rows}});
    emulated::check(obstacle == nullptr, "the map was refused");
    return map;
  }
};

struct Mistakes {
  bool no_wait_for_tiles = false;
  bool early_release = false;
  bool read_before_wait = false;
  int missing_bytes = 0;
  bool no_fence = false;
};

// d = a b^T for a [64, K] and b [128, K], by a producer warp and a warp group, through `slots`
// tiles.
std::vector<float> product(const Matrix& a, const Matrix& b, const Launch& launch,
                           const Mistakes& mistakes = {}) {
  constexpr int kSlots = 2, kSlotBytes = (kRows + kColumns) * kRowBytes;
  std::vector<float> d(kRows * kColumns);
  const TensorMap a_map = a.map(kRows), b_map = b.map(kColumns);
  const int steps = (a.columns + kDepth - 1) / kDepth;
  const auto kernel = [&] {
    const uint32_t tiles = shared_memory(kTileAlignment);
    const auto full = [&](int slot) { return tiles + kSlots * kSlotBytes + 16 * slot; };
    const auto free = [&](int slot) { return full(slot) + 8; };
    if (thread_index() == 0) {
      for (int i = 0; i < kSlots; ++i) {
        barrier_init(full(i), 1);
        barrier_init(free(i), 128);
      }
      fence_barrier_init();
    }
    sync_block();
    if (warp_index() == 4) {
      for (int k = 0; k < steps && lane_index() == 0; ++k) {
        const int slot = k % kSlots;
        barrier_wait(free(slot), k / kSlots % 2 ^ 1);
        barrier_expect(full(slot), kSlotBytes + mistakes.missing_bytes);
        tma_load_2d(tiles + slot * kSlotBytes, a_map, full(slot), k * kDepth, 0);
        tma_load_2d(tiles + slot * kSlotBytes + kRows * kRowBytes, b_map, full(slot), k * kDepth,
                    0);
      }
      return;
    }
    float sums[kColumns / 2];
    for (int k = 0; k < steps; ++k) {
      const int slot = k % kSlots;
      const uint32_t tile = tiles + slot * kSlotBytes;
      if (!mistakes.no_wait_for_tiles) barrier_wait(full(slot), k / kSlots % 2);
      if (!mistakes.no_fence) wgmma_fence();
      for (int i = 0; i < kDepth / 16; ++i) {
        wgmma<BFloat16, kColumns>(sums, descriptor_k_major(tile + 32 * i),
                                  descriptor_k_major(tile + kRows * kRowBytes + 32 * i), k + i > 0);
      }
      wgmma_commit();
      if (mistakes.early_release) {
        barrier_arrive(free(slot));
        for (int i = 0; i < 4; ++i) sync_named(1, 128);
      }
      if (!mistakes.read_before_wait) wgmma_wait<0>(sums);
      if (!mistakes.early_release) barrier_arrive(free(slot));
    }
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = 16 * warp_index() + lane_index() / 4 + i / 2 % 2 * 8;
      d[row * kColumns + i / 4 * 8 + lane_index() % 4 * 2 + i % 2] = sums[i];
    }
    wgmma_wait<0>(sums);
  };
  emulated::run(launch, kernel);
  return d;
}

Launch launch_in(Order order) { return {1, 160, kTileAlignment + 2 * 192 * 128 + 64, order, 7}; }

bool same(const Matrix& a, const Matrix& b, const std::vector<float>& d) {
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      double sum = 0.0;
      for (int k = 0; k < a.columns; ++k) sum += static_cast<double>(a.at(r, k)) * b.at(c, k);
      if (!(std::abs(sum - d[r * kColumns + c]) < 1e-3)) return false;
    }
  }
  return true;
}

// Rows, columns and depth end inside of the boxes.
void products_of_swizzled_tiles() {
  const Matrix a(61, 264, 1), b(123, 264, 2);
  for (const Order order : kOrders)
    expect(same(a, b, product(a, b, launch_in(order))), "wrong numbers");
}

// A mistake must show in one of the orders: as a fault with such words, or as wrong numbers.
void must_show(const Mistakes& mistakes, const std::string& words = "wrong numbers",
               int depth = 320) {
  const Matrix a(64, depth, 1), b(128, depth, 2);
  std::string seen;
  for (const Order order : kOrders) {
    try {
      if (!same(a, b, product(a, b, launch_in(order), mistakes))) seen += "wrong numbers";
    } catch (const Fault& fault) {
      seen += fault.what();
    }
    seen += "; ";
  }
  if (seen.find(words) == std::string::npos) throw std::runtime_error("seen instead: " + seen);
}

void missing_wait_for_tiles_shows() {
  Mistakes mistakes;
  mistakes.no_wait_for_tiles = true;
  // Of more tiles than there are slots, arrivals would come in the wrong phase, which is a fault.
  must_show(mistakes, "wrong numbers", 128);
}

void early_release_shows() {
  Mistakes mistakes;
  mistakes.early_release = true;
  must_show(mistakes);
}

void sums_read_before_the_wait_show() {
  Mistakes mistakes;
  mistakes.read_before_wait = true;
  must_show(mistakes);
}

void missing_bytes_are_a_deadlock() {
  Mistakes mistakes;
  mistakes.missing_bytes = 16;
  must_show(mistakes, "deadlock");
}

void missing_fence_is_a_fault() {
  Mistakes mistakes;
  mistakes.no_fence = true;
  must_show(mistakes, "without wgmma.fence");
}

// Weights in registers, values [16, 64] whose rows lie along K.
void transposed_products() {
  const Matrix a(64, 16, 3), b(16, 64, 4);
  const TensorMap map = b.map(16);
  bool right = true;
  emulated::run({1, 128, kTileAlignment + 16 * kRowBytes + 8, Order::kLate, 0}, [&] {
    const uint32_t tile = shared_memory(kTileAlignment), full = tile + 16 * kRowBytes;
    if (thread_index() == 0) {
      barrier_init(full, 1);
      fence_barrier_init();
      barrier_expect(full, 16 * kRowBytes);
      tma_load_2d(tile, map, full, 0, 0);
    }
    sync_block();
    const int row = 16 * warp_index() + lane_index() / 4, two = lane_index() % 4 * 2;
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const int r = row + i % 2 * 8, k = two + i / 2 * 8;
      words[i] = pack2<BFloat16>(a.at(r, k), a.at(r, k + 1));
    }
    float sums[32];
    barrier_wait(full, 0);
    wgmma_fence();
    wgmma_transposed<BFloat16, 64>(sums, words, descriptor_mn_major(tile, 16), false);
    wgmma_commit();
    wgmma_wait<0>(sums);
    for (int i = 0; i < 32; ++i) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k)
        sum += a.at(row + i / 2 % 2 * 8, k) * b.at(k, i / 4 * 8 + two + i % 2);
      right &= std::abs(sum - sums[i]) < 1e-4f;
    }
  });
  expect(right, "wrong numbers");
}

// d [16, 8] = a [16, 16] b [16, 8] of one warp, both loaded by cp.async and ldmatrix.
void products_of_a_warp() {
  const Matrix a(16, 16, 5), b(16, 16, 6);
  for (const Order order : kOrders) {
    bool right = true;
    emulated::run({1, 32, 2048, order, 0}, [&] {
      const uint32_t tile = shared_memory(16);
      const int row = lane_index() % 16, half = lane_index() / 16;
      cp_async_16(tile + row * 32 + half * 16, a.data.data() + row * 16 + half * 8, 16);
      cp_async_16(tile + 512 + row * 32 + half * 16, b.data.data() + row * 16 + half * 8,
                  row < 8 ? 16 : 0);
      cp_async_commit();
      cp_async_wait<0>();
      sync_warp();
      uint32_t left[4], up[4];
      load_matrices(left, tile + row * 32 + half * 16);
      load_transposed_matrices(up, tile + 512 + row * 32 + half * 16);
      float d[4] = {};
      mma<BFloat16>(d, left, up[0], up[1]);
      for (int i = 0; i < 4; ++i) {
        float sum = 0.0f;
        for (int k = 0; k < 8; ++k) {
          sum += a.at(lane_index() / 4 + i / 2 * 8, k) * b.at(k, lane_index() % 4 * 2 + i % 2);
        }
        right &= std::abs(sum - d[i]) < 1e-4f;
      }
    });
    expect(right, "wrong numbers");
  }
}

// Every number that a float16 or bfloat16 can be survives, and halves are rounded to even.
void rounding() {
  for (int i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const float half = Float16::number(bits), brain = BFloat16::number(bits);
    expect(half != half || Float16::bits(half) == bits, "float16");
    expect(brain != brain || BFloat16::bits(brain) == bits, "bfloat16");
  }
  expect(Float16::bits(2049.0f) == Float16::bits(2048.0f), "2049");
  expect(Float16::bits(2051.0f) == Float16::bits(2052.0f), "2051");
  expect(Float16::bits(65520.0f) == 0x7c00, "overflow");
  expect(BFloat16::bits(257.0f) == BFloat16::bits(256.0f), "257");
}

std::string fault_of(const Launch& launch, const std::function<void()>& kernel) {
  try {
    emulated::run(launch, kernel);
  } catch (const Fault& fault) {
    return fault.what();
  }
  return "";
}

void expect_fault(const Launch& launch, const std::function<void()>& kernel, const char* words) {
  const std::string fault = fault_of(launch, kernel);
  expect(fault.find(words) != std::string::npos,
         ("expected: " + std::string(words) + ", got: " + fault).c_str());
}

void written_tiles_need_a_fence() {
  const Matrix a(16, 64, 5);
  const auto kernel = [&](bool fenced) {
    const uint32_t tile = shared_memory(kTileAlignment);
    for (int i = thread_index(); i < 64 * 8; i += 128)
      cp_async_16(tile + 16 * i, a.data.data(), 16);
    cp_async_commit();
    cp_async_wait<0>();
    if (fenced) fence_async_proxy();
    sync_block();
    float sums[32];
    wgmma_fence();
    wgmma<BFloat16, 64>(sums, descriptor_k_major(tile), descriptor_k_major(tile), false);
    wgmma_commit();
    wgmma_wait<0>(sums);
  };
  for (const Order order : kOrders) {
    const Launch launch{1, 128, kTileAlignment + 64 * kRowBytes, order, 0};
    emulated::run(launch, [&] { kernel(true); });
    expect_fault(launch, [&] { kernel(false); }, "without a fence");
  }
}

void deadlocks_and_misuse_are_faults() {
  const Launch launch{1, 64, 2048, Order::kEager, 0};
  expect_fault(
      launch,
      [] {
        if (warp_index() == 0) sync_block();
      },
      "deadlock");
  expect_fault(
      launch,
      [] {
        if (lane_index() < 31) sync_warp();
      },
      "deadlock");
  expect_fault(
      launch,
      [] {
        if (warp_index() == 0) arrive_named(1, 64);
      },
      "half full");
  expect_fault(launch, [] { barrier_wait(shared_memory(8), 0); }, "was not made");
  expect_fault(launch, [] { raise_registers<24>(); }, "wrong direction");
  expect_fault(launch, [] { raise_registers<256>(); }, "wait for registers");
  expect_fault(launch, [] { emulated::block->at(0, 1); }, "outside shared memory");
  expect_fault({1, 32, 240000}, [] {}, "more shared memory");
  expect_fault(
      launch,
      [] {
        const uint32_t barrier = shared_memory(8);
        if (thread_index() == 0) {
          barrier_init(barrier, 1);
          fence_barrier_init();
          std::memset(emulated::block->at(barrier, 8), 0, 8);
          barrier_arrive(barrier);
        }
      },
      "written over");
}

#define CHECK(name) {#name, name}
const std::map<std::string, void (*)()> kChecks = {
    CHECK(clusters_share_copies),
    CHECK(mistakes_of_clusters_show),
    CHECK(stores_reach_other_blocks),
    CHECK(mistakes_of_stores_show),
    CHECK(products_of_swizzled_tiles),
    CHECK(missing_wait_for_tiles_shows),
    CHECK(early_release_shows),
    CHECK(sums_read_before_the_wait_show),
    CHECK(missing_bytes_are_a_deadlock),
    CHECK(missing_fence_is_a_fault),
    CHECK(transposed_products),
    CHECK(products_of_8_bits),
    CHECK(products_of_a_warp),
    CHECK(rounding),
    CHECK(rounding_to_8_bits),
    CHECK(written_tiles_need_a_fence),
    CHECK(deadlocks_and_misuse_are_faults),
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || kChecks.count(argv[1]) == 0) {
    for (const auto& [name, check] : kChecks) std::printf("%s\n", name.c_str());
    return argc == 1 ? 0 : 2;
  }
  try {
    kChecks.at(argv[1])();
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", argv[1], error.what());
    return 1;
  }
  return 0;
}
