"""Mistakes in the CUDA kernel of expert_linear, which the tests run on the CPU."""

from __future__ import annotations

from bugs.bug import CUDA_LINEAR, Bug

_FORWARD = (f"{CUDA_LINEAR}::test_forward",)
_CLUSTERS = (f"{CUDA_LINEAR}::test_clusters",)
_MORE_TILES = (f"{CUDA_LINEAR}::test_clusters_that_have_more_than_one_tile",)

CUDA_LINEAR_BUGS = (
    Bug(
        "cuda-linear-half-a-step-along-k",
        "csrc/cuda/expert_linear.cuh",
        "descriptor_k_major(ring.weights(step) + 32 * i)",
        "descriptor_k_major(ring.weights(step) + 16 * i)",
        _FORWARD,
    ),
    Bug(
        "cuda-linear-slot-left-while-it-is-read",
        "csrc/cuda/expert_linear.cuh",
        "wgmma_wait<1>();",
        "wgmma_wait<2>();",
        _FORWARD,
    ),
    Bug(
        "cuda-linear-sums-read-before-they-are-there",
        "csrc/cuda/expert_linear.cuh",
        "wgmma_wait<0>(sums[0], sums[1]);",
        "wgmma_wait<1>(sums[0], sums[1]);",
        _FORWARD,
    ),
    Bug(
        "cuda-linear-first-round-of-the-ring-waits",
        "csrc/cuda/expert_linear.cuh",
        "barrier_wait(ring.free(step), ring.parity(step) ^ 1);\n        barrier_expect",
        "barrier_wait(ring.free(step), ring.parity(step));\n        barrier_expect",
        _FORWARD,
    ),
    Bug(
        "cuda-linear-last-turn-left-over",
        "csrc/cuda/expert_linear.cuh",
        "if (group == count % 2) take_turn();",
        "if (group == count % 2 && count > 2) take_turn();",
        _FORWARD,
    ),
    Bug(
        "cuda-linear-gathered-rows-not-fenced",
        "csrc/cuda/expert_linear.cuh",
        "    fence_async_proxy();\n",
        "",
        _FORWARD,
    ),
    Bug(
        "cuda-linear-gathered-rows-announced-too-early",
        "csrc/cuda/expert_linear.cuh",
        "cp_async_wait<kUnderWay>();",
        "cp_async_wait<kUnderWay + 1>();",
        (f"{CUDA_LINEAR}::test_every_order_gives_the_same_bits",),
    ),
    Bug(
        "cuda-linear-gathered-rows-not-swizzled",
        "csrc/cuda/expert_linear.cuh",
        "(chunk ^ row % 8) * 16",
        "chunk * 16",
        _FORWARD,
    ),
    Bug(
        "cuda-linear-weights-of-the-first-expert",
        "csrc/cuda/expert_linear.cuh",
        "ring.full(step), depth, tile.column, tile.expert);",
        "ring.full(step), depth, tile.column, 0);",
        _FORWARD,
    ),
    Bug(
        "cuda-linear-bias-of-the-first-expert",
        "csrc/cuda/linear_epilogue.cuh",
        "int64_t{expert} * op.out_features + first",
        "int64_t{expert * 0} * op.out_features + first",
        _FORWARD,
    ),
    Bug(
        "cuda-linear-moments-over-columns-that-are-not-there",
        "csrc/cuda/linear_epilogue.cuh",
        "if (i < blocks) own +=",
        "own +=",
        _FORWARD,
    ),
    Bug(
        "cuda-linear-parts-equally-wide",
        "csrc/cuda/linear_epilogue.cuh",
        "min(features - part * width, width)",
        "width",
        (f"{CUDA_LINEAR}::test_statistics_in_any_parts",),
    ),
    Bug(
        "cuda-linear-rows-of-the-next-expert-written",
        "csrc/cuda/linear_epilogue.cuh",
        "place < end, 0.0f",
        "true, 0.0f",
        (CUDA_LINEAR,),
    ),
    Bug(
        "portable-linear-halves-of-the-weights-exchanged",
        "csrc/cuda/portable_linear.cuh",
        "mma<T>(sums[band] + column / 2 + 4, x[band], w[2], w[3]);",
        "mma<T>(sums[band] + column / 2 + 4, x[band], w[3], w[2]);",
        (f"{CUDA_LINEAR}::test_portable",),
    ),
    Bug(
        "portable-linear-stage-overwritten",
        "csrc/cuda/portable_linear.cuh",
        "      multiply(step);\n      sync_block();",
        "      multiply(step);",
        (f"{CUDA_LINEAR}::test_portable",),
    ),
    Bug(
        "portable-linear-columns-of-the-next-expert",
        "csrc/cuda/portable_linear.cuh",
        "real && real_column ? 16 : 0",
        "real ? 16 : 0",
        (f"{CUDA_LINEAR}::test_portable",),
    ),
    Bug(
        "cuda-linear-gelu-of-a-rough-tail",
        "csrc/cuda/linear_epilogue.cuh",
        "1.186670884e-01f",
        "1.19e-01f",
        (f"{CUDA_LINEAR}::test_gelu_of_any_number",),
    ),
    Bug(
        "cuda-linear-low-tiles-as-high-as-others",
        "csrc/cuda/linear_tiles.h",
        "{kTileDepth, bands * kBandRows}",
        "{kTileDepth, kMostBands * kBandRows}",
        (f"{CUDA_LINEAR}::test_low_tiles",),
    ),
    Bug(
        "cuda-linear-cluster-slot-free-when-one-block-has-left-it",
        "csrc/cuda/expert_linear.cuh",
        "barrier_init(free(i), 4 * Shape::kCluster);",
        "barrier_init(free(i), 4);",
        _MORE_TILES,
    ),
    Bug(
        "cuda-linear-cluster-tells-its-own-block-alone",
        "csrc/cuda/expert_linear.cuh",
        "if (lane_index() < Shape::kCluster) barrier_arrive_in_cluster(free(step), lane_index());",
        "if (lane_index() < Shape::kCluster) barrier_arrive(free(step));",
        _MORE_TILES,
    ),
    Bug(
        "cuda-linear-cluster-expects-its-own-share-of-the-weights",
        "csrc/cuda/expert_linear.cuh",
        "barrier_expect(ring.full(step), Shape::kSlotBytes);",
        "barrier_expect(ring.full(step), Shape::kRowsBytes + Shape::kWeightBytes / Shape::kCluster);",
        _CLUSTERS,
    ),
    Bug(
        "cuda-linear-cluster-ends-block-by-block",
        "csrc/cuda/expert_linear.cuh",
        "  if constexpr (kCluster > 1) sync_cluster();\n",
        "",
        _CLUSTERS,
    ),
    Bug(
        "cuda-linear-cluster-begins-block-by-block",
        "csrc/cuda/expert_linear.cuh",
        "  } else {\n    sync_cluster();\n  }",
        "  } else {\n    sync_block();\n  }",
        _CLUSTERS,
    ),
    Bug(
        "cuda-linear-cluster-stores-rows-that-are-not-real",
        "csrc/cuda/linear_epilogue.cuh",
        "    rows[r] = row_of_tile(op, tile.first + inside, tile.end);\n",
        "    rows[r] = row_of_tile(op, tile.first + inside, tile.end);\n"
        "    rows[r].real |= tile.first >= tile.end;\n",
        _CLUSTERS,
    ),
    Bug(
        "cuda-linear-cluster-shares-the-same-half-of-the-weights",
        "csrc/cuda/expert_linear.cuh",
        "depth, tile.column + before, tile.expert, kAll);",
        "depth, tile.column, tile.expert, kAll);",
        _CLUSTERS,
    ),
    Bug(
        "cuda-linear-cluster-where-it-costs-a-round",
        "csrc/cuda/linear_tiles.h",
        "tiles_of(tile_count(op, high), clusters) <= rounds ?",
        "rounds > 0 ?",
        (f"{CUDA_LINEAR}::test_clusters_are_taken_where_they_cost_no_round",),
    ),
)
