"""Mistakes in what happens to rows in front of the layers and behind them."""

from __future__ import annotations

from bugs.bug import Bug

STEPS = "tests/ops/test_gradient_steps.py"

ROWS_BUGS = (
    Bug(
        "words-with-positions",
        "csrc/cpu/linear_loops.h",
        "        if (Bare) store_some(bare + row * block.out_stride + out_place + k, y[i], columns - k);\n"
        "        if (Residual) y[i] = v_add(y[i], load_some(added + k, columns - k));\n",
        "        if (Residual) y[i] = v_add(y[i], load_some(added + k, columns - k));\n"
        "        if (Bare) store_some(bare + row * block.out_stride + out_place + k, y[i], columns - k);\n",
        ("tests/ops/test_patch_embedding.py",),
    ),
    Bug(
        "words-of-tokens-with-positions",
        "csrc/cpu/patch_embedding.cpp",
        "if (op.words != nullptr) store_element(op.dtype, op.words, row * op.out_features + i, value);",
        "",
        ("tests/ops/test_patch_embedding.py",),
    ),
    Bug(
        "rows-normalised-by-the-first-expert",
        "csrc/cpu/rows.cpp",
        "    block.bias = at + padded;\n",
        "    block.bias = at + padded;\n    block.weight = tasks.empty() ? block.weight : tasks[0].weight;\n",
        ("tests/ops/test_rows.py",),
    ),
    Bug(
        "rows-of-one-task-too-many",
        "csrc/cpu/rows.cpp",
        "block.count = std::min(kTaskRows, expert.end - row);",
        "block.count = expert.end - expert.begin < kTaskRows ? expert.end - row : kTaskRows - 1;",
        ("tests/ops/test_rows.py",),
    ),
    Bug(
        "rows-apart-normalised-as-dense",
        "csrc/cpu/rows.cpp",
        "elements_on(op.x, row * op.x_stride, op.dtype)",
        "elements_on(op.x, row * op.width, op.dtype)",
        ("tests/ops/test_rows.py",),
    ),
    Bug(
        "unpacked-padding-is-what-memory-held",
        "csrc/cpu/rows.cpp",
        "std::memset(to, 0, bytes);",
        "",
        ("tests/ops/test_rows.py",),
    ),
    Bug(
        "unpacked-rows-beyond-the-result",
        "csrc/row_ops.cpp",
        "call.places[r] >= 0 && call.places[r] < count",
        "call.places[r] >= 0 && call.places[r] <= count",
        ("tests/ops/test_rows.py",),
    ),
    Bug(
        "gradients-of-rows-along-themselves",
        "csrc/cpu/block_loops.h",
        "v_mul(v_fma(n, slope, v_sub(g, mean)), scale)",
        "v_mul(v_sub(g, mean), scale)",
        (STEPS,),
    ),
    Bug(
        "sums-of-gradients-from-the-last-rows-alone",
        "csrc/cpu/rows.cpp",
        "whole[0] += sums[2 * task * padded + i];",
        "whole[0] = sums[2 * task * padded + i];",
        (STEPS,),
    ),
    Bug(
        "gradients-of-rows-apart-as-if-dense",
        "csrc/cpu/rows.cpp",
        "block.grad = elements_on(op.grad, first * op.grad_stride, op.dtype);",
        "block.grad = elements_on(op.grad, first * op.width, op.dtype);",
        (STEPS,),
    ),
    Bug(
        "sums-of-gradients-upon-what-memory-held",
        "csrc/cpu/block_loops.h",
        "    v_store(block.bias_grad + i, v_zero());\n",
        "",
        (STEPS,),
    ),
    Bug(
        "the-last-row-left-out-when-transposed",
        "csrc/cpu/block_loops.h",
        "for (int64_t unit = 0; unit < ceil_div(count, Arch::kPerUnit); ++unit) {",
        "for (int64_t unit = 0; unit < max_of(1, count / Arch::kPerUnit); ++unit) {",
        (STEPS,),
    ),
)
