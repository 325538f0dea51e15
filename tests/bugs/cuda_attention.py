"""Mistakes in the CUDA kernels of shared_attention, which the tests run on the CPU."""

from __future__ import annotations

from bugs.bug import CUDA_ATTENTION, Bug

_FORWARD = (f"{CUDA_ATTENTION}::test_forward",)
_FOREIGN = (f"{CUDA_ATTENTION}::test_nothing_of_another_sample_or_head_is_seen",)
_LAST = (f"{CUDA_ATTENTION}::test_last_blocks_of_every_size",)

CUDA_ATTENTION_BUGS = (
    Bug(
        "cuda-attention-boxes-run-over-the-end",
        "csrc/cuda/attention_loads.cuh",
        "if (padding(first + own) || places.together(first + own, 8)) {",
        "if (padding(first + own) || places.together(first + own, 1)) {",
        _FORWARD,
    ),
    Bug(
        "cuda-attention-padding-of-the-rows-behind",
        "csrc/cuda/attention_loads.cuh",
        "padding(place) ? num_rows : places.row(place)",
        "places.row(place)",
        _FOREIGN,
    ),
    Bug(
        "cuda-attention-text-before-the-last-vision-row",
        "csrc/cuda/attention_rows.cuh",
        "cu_vision[batch] + text,",
        "cu_vision[sample + 1] + text,",
        _FORWARD,
    ),
    Bug(
        "cuda-attention-selected-text-in-the-place-of-vision",
        "csrc/cuda/attention_rows.cuh",
        "(query < queries.num_vision ? 0 : keys.num_vision)",
        "(query < keys.num_vision ? 0 : keys.num_vision)",
        _FORWARD,
    ),
    Bug(
        "cuda-attention-one-key-too-many",
        "csrc/cuda/attention_softmax.cuh",
        "i % 2 >= pair.limit[i / 2]",
        "i % 2 > pair.limit[i / 2]",
        _FORWARD,
    ),
    Bug(
        "cuda-attention-log-sum-exp-of-another-base",
        "csrc/cuda/attention_softmax.cuh",
        "log2f(total)",
        "logf(total)",
        (f"{CUDA_ATTENTION}::test_log_sum_exp",),
    ),
    Bug(
        "cuda-attention-a-sum-of-nothing-divides",
        "csrc/cuda/attention_softmax.cuh",
        "1.0f / (total == 0.0f ? 1.0f : total)",
        "1.0f / total",
        (f"{CUDA_ATTENTION}::test_a_query_that_sees_no_key_gives_zeros",),
    ),
    Bug(
        "cuda-attention-scale-of-zero-hides-nothing",
        "csrc/cuda/attention_plan.cuh",
        "std::max(op.scale * 1.4426950408889634f, FLT_MIN)",
        "op.scale * 1.4426950408889634f",
        (f"{CUDA_ATTENTION}::test_a_scale_of_zero_gives_the_mean_of_what_is_seen",),
    ),
    Bug(
        "cuda-attention-queries-of-the-tile-before",
        "csrc/cuda/attention_whole.cuh",
        "    q_parity ^= 1;\n",
        "",
        _FORWARD,
    ),
    Bug(
        "cuda-attention-earlier-sums-keep-their-scale",
        "csrc/cuda/attention_steps.cuh",
        "sums[i] *= decay[i / 2 % 2];",
        "sums[i] *= decay[0];",
        _LAST,
    ),
    Bug(
        "cuda-attention-keys-left-while-they-are-read",
        "csrc/cuda/attention_steps.cuh",
        "wgmma_wait<1>(scores);",
        "wgmma_wait<2>(scores);",
        _FORWARD,
    ),
    Bug(
        "cuda-attention-last-block-cut-short",
        "csrc/cuda/attention_steps.cuh",
        "if (shorter && rest <= 32)",
        "if (shorter)",
        _LAST,
    ),
    Bug(
        "cuda-attention-second-part-of-values-elsewhere",
        "csrc/cuda/attention_products.cuh",
        "kSlots * kRowBytes)",
        "kQueries * kRowBytes)",
        _FORWARD,
    ),
    Bug(
        "cuda-attention-portable-stage-filled-while-it-is-read",
        "csrc/cuda/portable_attention.cuh",
        "      meet(pair, block, softmax);\n      sync_block();",
        "      meet(pair, block, softmax);",
        (CUDA_ATTENTION,),
    ),
)
