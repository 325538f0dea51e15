"""Mistakes around the CUDA kernels: build, binding, choice, check."""

from __future__ import annotations

from bugs.bug import CUDA_BINDING, CUDA_DISPATCH, Bug

CUDA_BUGS = (
    Bug(
        "cuda-binding-positions-of-the-queries-lost",
        "csrc/cuda_ops.cpp",
        "    call.positions_q = offsets(",
        "    offsets(",
        (f"{CUDA_BINDING}::test_shared_attention",),
    ),
    Bug(
        "cuda-binding-residual-read-with-the-stride-of-y",
        "csrc/cuda_ops.cpp",
        "call.residual_stride = residual->stride(0);",
        "call.residual_stride = y.stride(0);",
        (f"{CUDA_BINDING}::test_expert_linear",),
    ),
    Bug(
        "cuda-binding-bounds-beyond-the-rows",
        "csrc/cuda_ops.cpp",
        "require(last <= count, op",
        "require(last <= count + 1, op",
        (f"{CUDA_BINDING}::test_the_binding_refuses",),
    ),
    Bug(
        "cuda-weights-of-the-first-experts-for-all-launches",
        "beit3_fast/ops/cuda_kernels.py",
        "t[e : e + len(own) - 1]",
        "t[: len(own) - 1]",
        (f"{CUDA_BINDING}::test_more_experts_than_one_launch_takes",),
    ),
    Bug(
        "cuda-rows-that-begin-anywhere-taken",
        "beit3_fast/ops/cuda_kernels.py",
        "and tensor.data_ptr() % _ALIGNMENT == 0",
        "",
        (f"{CUDA_BINDING}::test_only_rows_that_are_not_aligned_are_copied",),
    ),
    Bug(
        "cuda-moments-of-the-first-rows-for-gathered-ones",
        "beit3_fast/ops/cuda_kernels.py",
        'launch("row_statistics", x, rows, moments)',
        'launch("row_statistics", x, None if rows is None else rows.sort().values[:1], moments)',
        (f"{CUDA_BINDING}::test_expert_linear",),
    ),
    Bug(
        "cuda-statistics-that-came-with-the-rows-not-read",
        "beit3_fast/ops/cuda_kernels.py",
        "if folded.sums is not None and x_parts is not None:",
        "if False:",
        (f"{CUDA_BINDING}::test_the_statistics_that_an_op_leaves_are_those_of_its_rows",),
    ),
    Bug(
        "cuda-statistics-of-heads-asked-for-and-not-left",
        "beit3_fast/ops/cuda_kernels.py",
        "        parts = left if measure else None\n        leaves",
        "        parts = None\n        leaves",
        (f"{CUDA_BINDING}::test_the_statistics_that_an_op_leaves_are_those_of_its_rows",),
    ),
    Bug(
        "cuda-taken-though-its-check-failed",
        "beit3_fast/ops/dispatch.py",
        '"cuda": _obstacle("cuda", at) or doubts[0],',
        '"cuda": _obstacle("cuda", at),',
        (f"{CUDA_DISPATCH}::test_kernels_that_fail_are_left_out",),
    ),
    Bug(
        "cuda-taken-for-any-sizes",
        "beit3_fast/ops/dispatch.py",
        "at.device, at.dtype, at.needs_grad) or at.misfit",
        "at.device, at.dtype, at.needs_grad)",
        (f"{CUDA_BINDING}::test_sizes_that_the_kernels_do_not_take_are_said",),
    ),
    Bug(
        "cuda-code-of-sm-90a-on-every-gpu-of-its-generation",
        "beit3_fast/ops/cuda_kernels.py",
        'if arch.endswith("a"):',
        'if arch.endswith("x"):',
        (f"{CUDA_DISPATCH}::test_which_gpus_code_runs_on",),
    ),
    Bug(
        "cuda-check-that-hung-before-the-gpu-is-kept",
        "beit3_fast/ops/kernel_process.py",
        "return said, _READY in str(error.stdout)",
        "return said, True",
        (f"{CUDA_DISPATCH}::TestProcess::test_one_that_never_ends_is_stopped",),
    ),
    Bug(
        "setup-first-host-compiler-or-none",
        "setup_cuda.py",
        "        if not said:\n            return Nvcc",
        "        if True:\n            return Nvcc",
        ("tests/build/test_setup_cuda.py",),
    ),
    Bug(
        "resources-clusters-without-multicast-allowed",
        "bench/cuda_resources.py",
        "(self.multicasts > 0) is (self.cluster > 1 and not shares_sums)",
        "self.cluster > 1 or self.multicasts == 0",
        ("tests/bench/test_cuda_resources.py::test_each_rule_can_be_broken",),
    ),
    Bug(
        "resources-local-memory-of-cuda-kernels-allowed",
        "bench/cuda_resources.py",
        "self.stack or self.local_accesses",
        "self.stack",
        ("tests/bench/test_cuda_resources.py::test_each_rule_can_be_broken",),
    ),
)
