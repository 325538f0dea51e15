"""Mistakes in the Triton kernels."""

from __future__ import annotations

from bugs.bug import TRITON_ATTENTION, TRITON_CROSS_ENTROPY, TRITON_GRADIENTS, Bug

_BACKWARD = "kernels/_shared_attention_backward.py"
_ATTENTION_TILES = (f"{TRITON_ATTENTION}::test_gradients_by_the_tiles_that_are_shipped",)

KERNELS_BUGS = (
    Bug(
        "triton-third-slice-of-a-tile-on-the-first",
        "kernels/expert_linear.py",
        "tile_n * BLOCK_N + i * width,",
        "tile_n * BLOCK_N + (i % 2) * width,",
        ("tests/ops/test_triton_expert_linear.py::test_every_slice_of_a_tile_has_its_own_columns",),
    ),
    Bug(
        "triton-third-slice-of-a-weight-gradient-on-the-first",
        "kernels/_weight_gradient.py",
        "first_k + i * width + tl.arange(0, width)",
        "first_k + (i % 2) * width + tl.arange(0, width)",
        (f"{TRITON_GRADIENTS}::test_parts_hold_the_rows_of_one_expert_each",),
    ),
    Bug(
        "triton-causal-key-gradient-starts-behind-its-first-queries",
        _BACKWARD,
        "        if MASK == CAUSAL:\n            start = first_key // BLOCK_Q * BLOCK_Q\n",
        "        if MASK == CAUSAL:\n            start = (first_key + BLOCK_K - 1) // BLOCK_Q * BLOCK_Q\n",
        _ATTENTION_TILES,
    ),
    Bug(
        "triton-seq2seq-key-gradient-starts-behind-its-first-queries",
        _BACKWARD,
        "tl.where(first_key >= num_vision, first_key // BLOCK_Q * BLOCK_Q, 0)",
        "tl.where(first_key >= num_vision, (first_key + BLOCK_K - 1) // BLOCK_Q * BLOCK_Q, 0)",
        _ATTENTION_TILES,
    ),
    Bug(
        "triton-last-step-of-a-part-takes-rows-of-the-next-expert",
        "kernels/_weight_gradient.py",
        "        real = real & (row < end)[:, None]\n",
        "        real = real\n",
        (f"{TRITON_GRADIENTS}::test_gradients",),
    ),
    Bug(
        "triton-gelu-derivative-without-its-slope",
        "kernels/_expert_linear_backward.py",
        "dz *= 0.5 * (1.0 + tl.erf(z * _SQRT_HALF)) + z * bell",
        "dz *= 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))",
        (f"{TRITON_GRADIENTS}::test_gradients",),
    ),
    Bug(
        "triton-norm-backward-keeps-the-mean",
        "kernels/_expert_linear_backward.py",
        "(g - (tl.sum(g, 1) / K)[:, None] - normed",
        "(g - normed",
        (f"{TRITON_GRADIENTS}::test_gradients",),
    ),
    Bug(
        "triton-statistics-of-the-rows-before-they-are-rounded",
        "kernels/expert_linear.py",
        "        y = tl.where(real_column[None, :], y.to(tl.float32), 0.0)\n",
        "        y = tl.where(real_column[None, :], acc, 0.0)\n",
        ("tests/ops/test_triton_expert_linear.py::test_statistics_are_those_of_the_stored_rows",),
    ),
    Bug(
        "statistics-of-other-rows-than-those-that-are-read",
        "beit3_fast/ops/operands.py",
        "parts = None if self.parts is None else self.parts[rows]",
        "parts = None if self.parts is None else self.parts[: len(rows)]",
        ("tests/ops/test_expert_linear.py::test_selected_rows_keep_their_statistics",),
    ),
    Bug(
        "statistics-stay-behind-drop-path",
        "beit3_fast/model/encoder.py",
        "return Measured(kept.add(x.rows, branch, None))",
        "return x._replace(rows=kept.add(x.rows, branch, None))",
        (
            "tests/ops/test_triton_model.py::test_drop_path_changes_the_rows_and_drops_their_statistics",
        ),
    ),
    Bug(
        "triton-padding-of-the-vocabulary-counts",
        "kernels/masked_linear_cross_entropy.py",
        '        z = tl.where((column < V)[None, :], z, float("-inf"))\n',
        "",
        (f"{TRITON_CROSS_ENTROPY}::test_losses_and_gradients",),
    ),
    Bug(
        "triton-whole-rows-without-the-mask",
        "kernels/shared_attention.py",
        'pieces += (tl.where(place[None, :] < limit[:, None], scores, float("-inf")),)',
        "pieces += (scores,)",
        (f"{TRITON_ATTENTION}::test_whole_rows_of_scores",),
    ),
    Bug(
        "composite-layer-norm-sums-in-16-bits",
        "beit3_fast/composite/_layer_norm.py",
        'return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)',
        "return False",
        ("tests/ops/test_layer_norm_gradients.py::test_sums_over_many_rows",),
    ),
    Bug(
        "triton-large-tiles-for-an-odd-number-of-columns",
        "kernels/expert_linear.py",
        "if features % 16 or (out % 16 and not plain):",
        "if features % 16:",
        ("tests/ops/test_triton_tiles.py::test_sizes_that_16_does_not_divide_have_their_own_tile",),
    ),
)
