"""Mistakes of the compiled CPU kernels in where memory lies, whose it is and how long it is kept."""

from __future__ import annotations

from bugs.bug import FAR_ROWS, PROCESSES, THREADS, Bug

NATIVE_MEMORY_BUGS = (
    Bug(
        "linear-rows-at-int32-offsets",
        "csrc/cpu/linear_loops.h",
        "row_of(block, block.first + begin + r) * block.x_stride;",
        "static_cast<int32_t>(row_of(block, block.first + begin + r) * block.x_stride);",
        (f"{FAR_ROWS}::test_expert_linear",),
    ),
    Bug(
        "linear-residual-at-int32-offsets",
        "csrc/cpu/linear_loops.h",
        "residual + row * block.residual_stride + residual_place",
        "residual + static_cast<int32_t>(row * block.residual_stride) + residual_place",
        (f"{FAR_ROWS}::test_expert_linear",),
    ),
    Bug(
        "packed-weight-int32-bytes-of-a-row",
        "csrc/cpu/packed_weight.cpp",
        "static_cast<const char*>(weight) + (first + j) * row_bytes;",
        "static_cast<const char*>(weight) + (first + j) * static_cast<int32_t>(row_bytes);",
        (f"{FAR_ROWS}::test_weights",),
    ),
    Bug(
        "attention-keys-at-int32-offsets",
        "csrc/cpu/attention_loops.h",
        "static_cast<const T*>(block.k) + key_row(block, key) * block.k_stride;",
        "static_cast<const T*>(block.k) + static_cast<int32_t>(key_row(block, key) * block.k_stride);",
        (f"{FAR_ROWS}::test_shared_attention",),
    ),
    Bug(
        "patches-at-int32-pixels",
        "csrc/cpu/patch_embedding.cpp",
        "std::memcpy(to, at(op.images, pixel, bytes), line);",
        "std::memcpy(to, at(op.images, static_cast<int32_t>(pixel), bytes), line);",
        (f"{FAR_ROWS}::test_patches",),
    ),
    Bug(
        "linear-parameters-shared-by-threads",
        "csrc/cpu/expert_linear.cpp",
        "thread_local BlockMemory memory;",
        "static BlockMemory memory;",
        (f"{THREADS}::test_biases_and_norms",),
    ),
    Bug(
        "patches-gathered-for-all-threads",
        "csrc/cpu/patch_embedding.cpp",
        "thread_local Scratch gathered, scratch;",
        "static Scratch gathered;\n    thread_local Scratch scratch;",
        (f"{THREADS}::test_patches",),
    ),
    Bug(
        "linear-packed-weight-kept-at-any-size",
        "csrc/cpu/expert_linear.cpp",
        "  memory.packed.keep_at_most(kMostPacked);\n",
        "",
        (f"{PROCESSES}::test_a_wide_weight_packed_for_a_call_does_not_stay",),
    ),
    Bug(
        "linear-packed-weight-in-new-memory",
        "csrc/cpu/expert_linear.cpp",
        "  memory.packed.keep_at_most(kMostPacked);\n",
        "  memory.packed.keep_at_most(0);\n",
        (f"{PROCESSES}::test_what_repeats_allocates_nothing_large",),
    ),
    Bug(
        "linear-tasks-in-new-memory",
        "csrc/cpu/expert_linear.cpp",
        "thread_local std::vector<LinearBlock> kept;",
        "std::vector<LinearBlock> kept;",
        (f"{PROCESSES}::test_what_repeats_allocates_nothing_large",),
    ),
    Bug(
        "parallel-error-of-a-task-lost",
        "csrc/cpu/parallel.h",
        "  if (shared.error != nullptr) std::rethrow_exception(shared.error);\n",
        "",
        (f"{PROCESSES}::test_want_of_memory_is_said_as_such",),
    ),
)
