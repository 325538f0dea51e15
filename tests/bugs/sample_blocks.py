"""Mistakes in layers whose samples threads take alone, which only AMX does."""

from __future__ import annotations

from bugs.bug import Bug

ALONE = ("tests/ops/test_sample_blocks.py", "tests/ops/test_emulated_levels.py")
BLOCKS = "csrc/cpu/sample_blocks.cpp"

SAMPLE_BLOCKS_BUGS = (
    Bug(
        "samples-alone-though-one-thread-waits",
        BLOCKS,
        "if (done - before > kEvenly * share) return {};",
        "if (done - before > 2 * share) return {};",
        ALONE,
    ),
    Bug(
        "samples-alone-of-heads-that-are-no-strips",
        BLOCKS,
        "width != layout.num_heads * kStrip ||",
        "width < 0 ||",
        ALONE,
    ),
    Bug(
        "samples-alone-of-two-experts-of-attention",
        "csrc/layer_ops.cpp",
        "if (!selected && of_one_expert(of_experts.all) && of_one_expert(of_experts.ffn)) {",
        "if (!selected && of_one_expert(of_experts.ffn)) {",
        ALONE,
    ),
    Bug(
        "samples-alone-of-two-experts-of-the-network",
        "csrc/layer_ops.cpp",
        "if (!selected && of_one_expert(of_experts.all) && of_one_expert(of_experts.ffn)) {",
        "if (!selected && of_one_expert(of_experts.all)) {",
        ALONE,
    ),
    Bug(
        "samples-alone-images-as-sentences",
        BLOCKS,
        "const bool vision = op_.layout.cu_text[op_.layout.batch] == 0;",
        "const bool vision = false;",
        ALONE,
    ),
    Bug(
        "samples-alone-by-the-lengths-of-the-first",
        BLOCKS,
        "bounds_of(op_.layout) + block.first_sample;",
        "bounds_of(op_.layout);",
        ALONE,
    ),
    Bug(
        "samples-alone-statistics-of-the-first-block-for-all",
        BLOCKS,
        "compute(layers_[layer], block, statistics + block.first_row - first);",
        "compute(layers_[layer], block, statistics);",
        ALONE,
    ),
    Bug(
        "samples-alone-statistics-of-what-memory-held",
        BLOCKS,
        "    std::fill_n(statistics, count, kUnmeasured);\n",
        "",
        ALONE,
    ),
    Bug(
        "samples-alone-first-piece-for-all",
        BLOCKS,
        "{on(o, from), x.apart}",
        "{on(o, 0), x.apart}",
        ALONE,
    ),
    Bug(
        "samples-alone-attention-of-a-piece-by-statistics-of-the-first",
        BLOCKS,
        "measured == nullptr ? nullptr : measured + from);",
        "measured);",
        ALONE,
    ),
    Bug(
        "samples-alone-values-as-keys",
        BLOCKS,
        "call.v = elements_on(qkv, 2 * width_ * block.rows, dtype_);",
        "call.v = call.k;",
        ALONE,
    ),
    Bug(
        "samples-alone-rows-of-x-side-by-side",
        BLOCKS,
        "rows_to_strips(dtype_, elements_on(op_.x, block.first_row * op_.x_stride, dtype_),\n"
        "                     op_.x_stride,",
        "rows_to_strips(dtype_, elements_on(op_.x, block.first_row * op_.x_stride, dtype_),\n"
        "                     width_,",
        ALONE,
    ),
    Bug(
        "many-rows-at-once-whatever-lies-between",
        "csrc/layer_ops.cpp",
        "require(!most_rows.has_value() || x.size(0) <= *most_rows,",
        "require(!most_rows.has_value() || x.size(0) > 0,",
        ("tests/ops/test_sample_blocks.py", "tests/model/test_encode_in_parts.py"),
    ),
)
