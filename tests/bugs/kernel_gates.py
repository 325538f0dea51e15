"""Mistakes in the Triton kernels, and in what stands guard over them, that small even calls do not show."""

from __future__ import annotations

from bugs.bug import (
    COMPILE,
    KERNEL_CHECK,
    KERNEL_RESOURCES,
    OP_CONTRACT,
    TRITON_DISPATCH,
    TRITON_FAR,
    TRITON_PADDING,
    TRITON_STRIDES,
    TRITON_TILES,
    Bug,
)

_FORWARD = "kernels/shared_attention.py"
_BACKWARD = "kernels/_shared_attention_backward.py"
_ATTENTION = (f"{TRITON_STRIDES}::test_attention",)
_PADDED = (f"{TRITON_PADDING}::test_the_numbers_without_padding",)
_SELF_CHECK = (f"{KERNEL_CHECK}::test_the_kernels_pass_whatever_modes_the_caller_is_in",)
_FAR = (f"{TRITON_FAR}::test_far_rows_are_as_near_ones",)
_SPOILED = (f"{TRITON_TILES}::test_a_spoiled_file_says_what_is_wrong",)
_MISFIT = (f"{TRITON_TILES}::test_a_tile_that_no_multiprocessor_can_hold_is_refused",)

KERNEL_GATES_BUGS = (
    Bug(
        "triton-attention-knows-near-rows-only",
        "kernels/_attention_rows.py",
        "    return row.to(tl.int64)\n",
        "    return row\n",
        _FAR,
    ),
    Bug(
        "triton-linear-knows-near-rows-only",
        "kernels/expert_linear.py",
        "row = tl.minimum(place, end - 1).to(tl.int64)",
        "row = tl.minimum(place, end - 1)",
        _FAR,
    ),
    Bug(
        "triton-wrong-for-long-samples-of-wide-heads",
        _FORWARD,
        "    batch = keys.cu_vision.shape[0] - 1\n    tiles = triton.cdiv(queries.longest, tile.block_q)\n",
        "    batch = keys.cu_vision.shape[0] - 1\n    tiles = triton.cdiv(queries.longest, tile.block_q)\n"
        "    scale *= 1 + (head_dim > 64 and keys.longest > 256)\n",
        _SELF_CHECK,
    ),
    Bug(
        "triton-wrong-for-odd-columns-of-many-rows",
        "kernels/expert_linear.py",
        "tma = tile.tma and rows is None and all(map(_fits_tma, (x, folded.weights)))",
        "x = x * (1 + (bounds[-1] > 256 and out % 16 > 0 and x.dtype != torch.float32))\n"
        "    tma = tile.tma and rows is None and all(map(_fits_tma, (x, folded.weights)))",
        _SELF_CHECK,
    ),
    Bug(
        "triton-padding-is-seen-step-by-step",
        _FORWARD,
        "            place = without_padding(place, num_vision, num_keys, valid_ptr)\n",
        "",
        _PADDED,
    ),
    Bug(
        "triton-padding-is-seen-in-whole-rows",
        _FORWARD,
        "takes_whole = keys.valid is None and keys.longest",
        "takes_whole = keys.longest",
        _PADDED,
    ),
    Bug(
        "triton-padding-in-keys-that-all-queries-see",
        _FORWARD,
        "seen_by_all = tl.minimum(seen_by_all, num_vision)",
        "seen_by_all = seen_by_all + 0",
        _PADDED,
    ),
    Bug(
        "triton-padding-is-seen-by-the-gradient-of-queries",
        _BACKWARD,
        "        place = without_padding(place, num_vision, num_keys, valid_ptr)\n",
        "",
        _PADDED,
    ),
    Bug(
        "triton-padding-has-a-gradient",
        _BACKWARD,
        "    place = without_padding(place, num_vision, num_keys, valid_ptr)\n\n",
        "\n",
        _PADDED,
    ),
    Bug(
        "triton-padding-is-dropped-by-the-op",
        "beit3_fast/ops/shared_attention.py",
        "real = None if valid is None else valid.flatten()",
        "real = None",
        (*_PADDED, f"{TRITON_PADDING}::test_a_captured_model_with_text"),
    ),
    Bug(
        "compiled-embeddings-of-images-break-the-graph",
        "beit3_fast/model/embeddings.py",
        "if is_image_batch(images):",
        "if False and is_image_batch(images):",
        (f"{COMPILE}::test_embeddings_of_images_in_one_graph",),
    ),
    Bug(
        "triton-query-gradient-of-the-first-keys-only",
        _BACKWARD,
        "range(0, tl.max(limit, 0), BLOCK_K)",
        "range(0, tl.minimum(tl.max(limit, 0), BLOCK_K), BLOCK_K)",
        _ATTENTION,
    ),
    Bug(
        "triton-key-gradient-of-the-first-queries-only",
        _BACKWARD,
        "range(start, num_queries, BLOCK_Q)",
        "range(start, tl.minimum(num_queries, start + BLOCK_Q), BLOCK_Q)",
        _ATTENTION,
    ),
    Bug(
        "triton-values-read-by-the-stride-of-the-keys",
        _FORWARD,
        "load_heads(v_ptr, row, v_stride,",
        "load_heads(v_ptr, row, k_stride,",
        _ATTENTION,
    ),
    Bug(
        "triton-values-read-by-the-stride-of-the-keys-in-whole-rows",
        _FORWARD,
        "load_heads(v_ptr, rows[i], v_stride,",
        "load_heads(v_ptr, rows[i], k_stride,",
        _ATTENTION,
    ),
    Bug(
        "triton-query-gradient-reads-keys-by-the-stride-of-the-queries",
        _BACKWARD,
        "        k = load_heads(k_ptr + offset, key_row, k_stride,",
        "        k = load_heads(k_ptr + offset, key_row, q_stride,",
        _ATTENTION,
    ),
    Bug(
        "triton-query-gradient-reads-values-by-the-stride-of-the-queries",
        _BACKWARD,
        "        v = load_heads(v_ptr + offset, key_row, v_stride,",
        "        v = load_heads(v_ptr + offset, key_row, q_stride,",
        _ATTENTION,
    ),
    Bug(
        "triton-key-gradient-reads-keys-by-the-stride-of-the-queries",
        _BACKWARD,
        "    offset = head * D\n    k = load_heads(k_ptr + offset, key_row, k_stride,",
        "    offset = head * D\n    k = load_heads(k_ptr + offset, key_row, q_stride,",
        _ATTENTION,
    ),
    Bug(
        "triton-key-gradient-reads-values-by-the-stride-of-the-queries",
        _BACKWARD,
        "\n    v = load_heads(v_ptr + offset, key_row, v_stride,",
        "\n    v = load_heads(v_ptr + offset, key_row, q_stride,",
        _ATTENTION,
    ),
    Bug(
        "triton-residual-read-by-the-stride-of-the-result",
        "kernels/expert_linear.py",
        "residual_ptr + row[:, None] * residual_stride",
        "residual_ptr + row[:, None] * y_stride",
        (f"{TRITON_STRIDES}::test_linear",),
    ),
    Bug(
        "triton-head-reads-weights-by-their-width",
        "kernels/masked_linear_cross_entropy.py",
        "weight_row[None, :] * weight_stride",
        "weight_row[None, :] * D",
        (f"{TRITON_STRIDES}::test_head",),
    ),
    Bug(
        "self-check-takes-places-in-a-selection-for-places",
        _FORWARD,
        "place = tl.load(positions_ptr + row) + tl.where(own < num_vision_q, 0, num_vision)",
        "place = own",
        _SELF_CHECK,
    ),
    Bug(
        "self-check-takes-places-in-a-selection-for-places-in-gradients",
        _BACKWARD,
        "place = tl.load(positions_ptr + row) + tl.where(own < num_vision_q, 0, num_vision)",
        "place = own",
        _SELF_CHECK,
    ),
    Bug(
        "self-check-joins-squares-wrongly",
        "kernels/_row_statistics.py",
        "tl.store(joined_ptr + row * 2 + 1, squares, mask=real)",
        "tl.store(joined_ptr + row * 2 + 1, squares * 4.0, mask=real)",
        _SELF_CHECK,
    ),
    Bug(
        "self-check-of-another-driver-counts",
        "beit3_fast/ops/kernel_check.py",
        '        named["driver"] = _driver()\n',
        "",
        (f"{KERNEL_CHECK}::test_all_that_could_change_a_kernel_names_its_outcomes",),
    ),
    Bug(
        "tiles-of-true-rows",
        "kernels/_tiles.py",
        "type(value) is not type(allowed[0]) or value not in allowed",
        "value not in allowed",
        _SPOILED,
    ),
    Bug(
        "tiles-of-more-memory-than-there-is",
        "kernels/_tiles.py",
        'waiting = max(tile["num_stages"] - 1, 1) * numbers',
        "waiting = numbers",
        _MISFIT,
    ),
    Bug(
        "tiles-without-a-class",
        "kernels/_tiles.py",
        "_check_keys(place, tile, fields, OPTIONAL)",
        "_check_keys(place, tile, fields, set(fields))",
        _SPOILED,
    ),
    Bug(
        "tiles-of-narrow-heads-for-wide-ones",
        _FORWARD,
        'words = ["wide"] * (head_dim > 64)',
        'words = ["wide"] * (head_dim > 128)',
        (f"{TRITON_TILES}::test_wide_heads_have_their_own_tile",),
    ),
    Bug(
        "tiles-of-even-weights-for-odd-ones",
        "kernels/_weight_gradient.py",
        "bool(features % 16 or out % 16)",
        "bool(features % 16 and out % 16)",
        (f"{TRITON_TILES}::test_weights_of_odd_sizes_have_their_own_tile",),
    ),
    Bug(
        "budget-of-registers-for-one-program",
        "bench/kernel_residency.py",
        "whole.registers // (-(-registers // 8) * 8 * threads)",
        "whole.registers // 256",
        (f"{KERNEL_RESOURCES}::test_each_rule_can_be_broken",),
    ),
    Bug(
        "triton-launches-on-the-current-device",
        "beit3_fast/ops/triton_kernels.py",
        'if operands[0].device.type != "cuda":',
        "if True:",
        (f"{TRITON_DISPATCH}::test_every_op_launches_on_the_device_of_its_operands",),
    ),
    Bug(
        "norm-on-another-device",
        "beit3_fast/ops/operands.py",
        "            _check_devices(name, group, x)\n",
        "",
        (f"{OP_CONTRACT}::test_expert_linear",),
    ),
    Bug(
        "layout-on-another-device",
        "beit3_fast/ops/shared_attention.py",
        "own.device.type != q.device.type or",
        "own.device.type == q.device.type and",
        (f"{OP_CONTRACT}::test_shared_attention",),
    ),
)
