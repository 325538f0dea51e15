"""Mistakes in products of 8 bits: their kernels, what is done around them, and the models."""

from __future__ import annotations

from bugs.bug import CUDA_FLOAT8, CUDA_FLOAT8_OPS, FLOAT8, Bug

_FORWARD = (f"{CUDA_FLOAT8}::test_forward",)

CUDA_FLOAT8_BUGS = (
    Bug(
        "float8-sums-stay-in-the-tensor-cores",
        "csrc/cuda/portable_float8.cuh",
        "  float products[kTileColumns / 2] = {};",
        "  float products[kTileColumns / 2];\n"
        "  for (int i = 0; i < kTileColumns / 2; ++i) products[i] = sums[i], sums[i] = 0.0f;",
        (f"{CUDA_FLOAT8}::test_sums_in_fp32_between_blocks",),
    ),
    Bug(
        "float8-scales-of-the-step-before",
        "csrc/cuda/float8_linear.cuh",
        "take_scales(places, k + 1, steps, next)",
        "take_scales(places, k, steps, next)",
        _FORWARD,
    ),
    Bug(
        "float8-scales-of-the-upper-band",
        "csrc/cuda/float8_linear.cuh",
        "scales[2 * band + i / 2 % 2]",
        "scales[i / 2 % 2]",
        _FORWARD,
    ),
    Bug(
        "float8-slot-left-before-the-second-band",
        "csrc/cuda/float8_linear.cuh",
        "      for (int band = 0; band < kBands; ++band) add_band(sums, band, first + k, scales);\n"
        "      if (lane_index() == 0) barrier_arrive(ring.free(first + k));",
        "      for (int band = 0; band < kBands; ++band) {\n"
        "        add_band(sums, band, first + k, scales);\n"
        "        if (lane_index() == 0 && band == 0) barrier_arrive(ring.free(first + k));\n"
        "      }",
        (f"{CUDA_FLOAT8}::test_forward", f"{CUDA_FLOAT8}::test_every_order_gives_the_same_bits"),
    ),
    Bug(
        "float8-groups-share-a-ring",
        "csrc/cuda/float8_linear.cuh",
        "{base + group * Shape::kRingBytes}",
        "{base + group * 0 * Shape::kRingBytes}",
        _FORWARD,
        can_hang=True,
    ),
    Bug(
        "float8-scales-of-the-first-experts-weights",
        "csrc/cuda/float8_epilogue.cuh",
        "op.weight_scales + int64_t{tile.expert} * op.out_features",
        "op.weight_scales",
        _FORWARD,
    ),
    Bug(
        "float8-pairs-of-the-neighbour-block",
        "csrc/cuda/float8_epilogue.cuh",
        "words[0] >> 16 | (words[1] & 0xffff0000u)",
        "words[0] >> 16 | words[1] << 16",
        _FORWARD,
    ),
    Bug(
        "float8-largest-of-a-thread-for-the-row",
        "csrc/cuda/float8_epilogue.cuh",
        "unit(quad_max(largest))",
        "unit(largest)",
        _FORWARD,
    ),
    Bug(
        "float8-infinity-becomes-the-largest-number",
        "csrc/cuda/float8_scale.cuh",
        "found == kNotFinite ? 0x7fffffffu",
        "found < 0 ? 0x7fffffffu",
        (f"{CUDA_FLOAT8}::test_a_result_that_is_not_finite_is_seen_in_8_bits",),
    ),
    Bug(
        "float8-moments-over-columns-that-are-not-there",
        "csrc/cuda/quantize_rows.cuh",
        "sum_of_half(real() ? squares : 0.0f)",
        "sum_of_half(squares)",
        (f"{CUDA_FLOAT8}::test_quantized_rows",),
    ),
    Bug(
        "float8-rows-rounded-without-layer-norms-weight",
        "beit3_fast/ops/cuda_float8.py",
        "if numbers is None or scales is None or not plain:",
        "if numbers is None or scales is None:",
        (CUDA_FLOAT8_OPS,),
    ),
    Bug(
        "float8-weights-of-the-first-experts-for-all-launches",
        "beit3_fast/ops/cuda_float8.py",
        "t[e : e + len(own) - 1]",
        "t[: len(own) - 1]",
        (CUDA_FLOAT8_OPS,),
    ),
    Bug(
        "float8-layer-norms-bias-lost",
        "beit3_fast/model/float8.py",
        "+ plain @ beta",
        "+ 0 * plain @ beta",
        (f"{FLOAT8}::test_layer_norms_go_into_their_products",),
    ),
    Bug(
        "float8-scale-one-power-too-small",
        "beit3_fast/float8.py",
        "_LARGEST_LANDS_AT = 7",
        "_LARGEST_LANDS_AT = 9",
        (
            "tests/ops/test_float8_linear.py::test_numbers_are_within_half_a_step_and_stay_what_they_are",
        ),
    ),
    Bug(
        "float8-checkpoints-rounded-from-bfloat16",
        "beit3_fast/model/registry.py",
        "wanted = torch.float32 if int8 or float8 else",
        "wanted = torch.bfloat16 if float8 else torch.float32 if int8 else",
        (
            "tests/model/test_rounded_weights.py::test_a_checkpoint_is_rounded_from_its_own_precision",
        ),
    ),
    Bug(
        "float8-attention-scales-of-the-first-keys",
        "csrc/cuda/attention_float8.cuh",
        "for (int place = lane_index(); place < head.keys.count(); place += 32) {",
        "if (const int place = lane_index(); place < head.keys.count()) {",
        ("tests/cuda/test_cuda_attention_float8.py",),
    ),
    Bug(
        "float8-attention-one-scale-a-head",
        "csrc/cuda/attention_float8.cuh",
        "at / kBlock == block(0) ? bits[0] : bits[kParts - 1]",
        "bits[0]",
        ("tests/cuda/test_cuda_attention_float8.py",),
    ),
    Bug(
        "float8-attention-scales-of-the-queries",
        "beit3_fast/model/encoder.py",
        "projected.scales[:, -(v.shape[1] // BLOCK) :]",
        "projected.scales[:, : v.shape[1] // BLOCK]",
        ("tests/ops/test_cuda_float8_ops.py",),
    ),
    Bug(
        "float8-rows-without-memory-read",
        "beit3_fast/ops/float8_linear.py",
        "        if not x.stored:\n",
        "        if False:\n",
        ("tests/ops/test_cuda_float8_ops.py",),
    ),
)
