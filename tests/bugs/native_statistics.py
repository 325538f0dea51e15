"""Mistakes in the statistics of rows, measured or left by the kernels that write them."""

from __future__ import annotations

from bugs.bug import KERNELS, WHOLE_LAYER, Bug

STATISTICS = "tests/ops/test_row_statistics.py"
LOWER = f"{KERNELS}::test_lower_levels"

NATIVE_STATISTICS_BUGS = (
    Bug(
        "statistics-without-the-rounding-of-the-mean",
        "csrc/cpu/row_statistics.h",
        "return {centre, offset, variance",
        "return {centre, 0.0f, variance",
        (f"{KERNELS}::test_expert_linear_values", STATISTICS),
    ),
    Bug(
        "statistics-without-what-pairs-differ-by",
        "csrc/cpu/row_statistics.h",
        "    square = v_fma(v_mul(d, v_set(before * share)), d, square);\n",
        "",
        (STATISTICS,),
    ),
    Bug(
        "statistics-of-the-last-lanes-as-if-they-were-the-first",
        "csrc/cpu/row_statistics.h",
        "v_set(static_cast<float>(before) * share)",
        "v_set(share)",
        (STATISTICS,),
    ),
    Bug(
        "statistics-with-lanes-of-the-last-vector-uncounted",
        "csrc/cpu/row_statistics.h",
        "v_keep(v_set(1.0f), n % 16, 0.0f));",
        "v_zero());",
        (STATISTICS,),
    ),
    Bug(
        "sums-of-pairs-of-what-memory-held",
        "csrc/cpu/arch_avx512bf16.h",
        "both = column == 0 ? next : v_add(both, next);",
        "both = v_add(both, next);",
        (STATISTICS,),
    ),
    Bug(
        "statistics-of-columns-by-their-place-in-the-tile",
        "csrc/cpu/linear_loops.h",
        "sums.put(to + j, y, column + j);",
        "sums.put(to + j, y, j);",
        (STATISTICS, LOWER),
    ),
    Bug(
        "statistics-at-the-place-in-the-block",
        "csrc/cpu/linear_loops.h",
        "block.statistics[row] = measured",
        "block.statistics[r] = measured",
        (STATISTICS, LOWER),
    ),
    Bug(
        "amx-sums-of-the-first-rows-for-all",
        "csrc/cpu/amx_linear_loops.h",
        "words_ = row_sums_ + (first - block_.first) * Sums::kWords;",
        "words_ = row_sums_;",
        (STATISTICS,),
    ),
    Bug(
        "rest-of-a-layer-by-statistics-of-other-rows",
        "csrc/cpu/layer_rest.cpp",
        "    if (block.x_statistics != nullptr) block.x_statistics += rows.first;\n",
        "",
        (STATISTICS,),
    ),
    Bug(
        "rest-of-a-layer-leaves-statistics-at-other-rows",
        "csrc/cpu/layer_rest.cpp",
        "left == nullptr ? nullptr : left + rows.first);",
        "left);",
        (STATISTICS,),
    ),
    Bug(
        "statistics-of-some-panels-for-the-row",
        "csrc/cpu/expert_linear.cpp",
        "    task.statistics = nullptr;\n",
        "",
        (STATISTICS, LOWER),
    ),
    Bug(
        "statistics-of-the-layer-before-where-panels-are-shared",
        "csrc/cpu/expert_linear.cpp",
        "op.statistics[op.rows == nullptr ? r : op.rows[r]] = kUnmeasured;",
        "(void)r;",
        (STATISTICS, LOWER),
    ),
    Bug(
        "attention-leaves-statistics-at-the-place-in-the-sample",
        "csrc/cpu/shared_attention.cpp",
        "rows.out = op.statistics + row;",
        "rows.out = op.statistics + begin;",
        (STATISTICS,),
    ),
    Bug(
        "attention-leaves-statistics-of-an-earlier-layer",
        "csrc/cpu/shared_attention.cpp",
        "    std::fill_n(op.statistics, queries, kUnmeasured);\n",
        "    (void)queries;\n",
        (STATISTICS,),
    ),
    Bug(
        "first-layer-by-statistics-of-an-earlier-call",
        "csrc/layer_ops.cpp",
        "    std::fill_n(passing, rows, beit3_fast::cpu::kUnmeasured);\n",
        "",
        (STATISTICS, WHOLE_LAYER),
    ),
    Bug(
        "decoder-by-statistics-of-an-earlier-call",
        "csrc/layer_ops.cpp",
        "  std::fill_n(statistics.attention, asked, beit3_fast::cpu::kUnmeasured);\n",
        "",
        (WHOLE_LAYER,),
    ),
)
