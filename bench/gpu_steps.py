"""The steps of ``make gpu``: what must be right first, then what is measured, then the long searches for faults."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# A kernel that hangs keeps the interpreter from its signals: only a thread ends such a test, and the process with it.
PYTEST = (
    *(sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "--tb=short", "--maxfail=5"),
    *("-o", "timeout_method=thread"),
)
QUICK, EVERY = ("-m", "not full"), ("-m", "full or not full")
# Compiling gives the pace.
SIDE_BY_SIDE = ("-n", "8")
TRITON_TESTS = (
    "expert_linear",
    "shared_attention",
    "linear_gradients",
    "cross_entropy",
    "padding",
    "strides",
    "long",
    "registration",
    "model",
    "tiles",
    "dispatch",
)
# The tests of the CUDA kernels; without a GPU their binding runs in front of plain loops.
CUDA_TESTS = {
    "cuda": "test_cuda_binding",
    "cuda-float8": "test_cuda_float8_ops",
    "cuda-decoding": "test_cuda_decoding_binding",
}
CUDA_MODEL_TESTS = "tests/ops/test_cuda_model.py"
GRAPH_TESTS = ("tests/model/test_capture.py", "tests/model/test_step_graph.py")
# A step of bench/run.py each; the batches are those of the figures to reach.
WORKLOADS = (
    ("image/base/224", "256"),
    ("image/base/224", "1"),
    ("vqa/base/480", "64"),
    ("image/large/224", "256"),
    ("retrieval-text/base/384", "256"),
)
TRAINING = (("train/base/224", "128"), ("train-vqa/base/480", "32"))
OURS = ("beit3_fast", "beit3_fast-cuda", "beit3_fast-triton")
# Beside ours; their compiling takes minutes, so that they come last.
RUNTIMES = (*OURS, "beit3_fast-float8", "beit3_fast-composite", "torchscale", "timm")
COMPILED = ("beit3_fast", "torchscale-compiled")
COMPILED_TRAINING = ("beit3_fast", "torchscale-compiled-training")
FIGURES = ("products", "attention", "latency")
# A step of captions beside its memory floor.
DECODE = (sys.executable, "-m", "bench.decode_step")
TINY = "beit3_tiny_patch16_32_captioning"
BENCH = (sys.executable, "bench/run.py")
# One small case for each kernel; the sanitizer is some 20 times slower. The last one has parts of rows to join.
SANITIZED = (
    "(one and row) or (mixed and 2x88) or descriptors or 5-64 or 27-88 or every_mask "
    "or (op_before and 0.0-3-)"
)
SANITIZED_CUDA = {
    "cuda": "three or one or mixed or rows",
    "cuda-float8": "left or model",
    "cuda-decoding": "not captions and not refuses",
}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SOURCES = ("beit3_fast", "kernels", "csrc")
# What every test reads beside itself.
TEST_SOURCES = ("tests/conftest.py", "tests/ops/*_cases.py", "tests/ops/*.cpp")
# Without a GPU's kernels the tests would pass in front of stand-ins. PyTorch wants the other for equal bits.
ON_GPU = {"BEIT3_FAST_TESTS_NEED_GPU": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@dataclass(frozen=True)
class Step:
    """A command, the steps that must have passed before it, and the most seconds that it gets."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    limit_s: float = 530.0
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """The folders, files and patterns of files that a passed step says something about."""
        if "pytest" not in self.command:
            return (*SOURCES, "bench")
        return (*SOURCES, *TEST_SOURCES, *(w for w in self.command if w.startswith("tests/")))


def steps(device: str, dry_run: bool, out: Path) -> list[Step]:
    """What is to be done on a device, the most valuable first."""
    if dry_run:
        return [*_dry_run(device, out)]
    return [*_first(), *_measurements(device, out), *_searches()]


def _tests(name: str, files: tuple[str, ...], *options: str, limit_s: float = 530.0) -> Step:
    return Step(name, (*PYTEST, *files, *options), ("library",), limit_s, ON_GPU)


def _triton_tests(name: str, *tests: str, limit_s: float, chosen: tuple[str, ...]) -> Step:
    files = tuple(f"tests/ops/test_triton_{test}.py" for test in tests)
    return _tests(name, files, *chosen, *SIDE_BY_SIDE, limit_s=limit_s)


def _first() -> Iterator[Step]:
    """Every kernel once, each in a process that may hang, then the short tests."""
    yield Step("library", (sys.executable, "-m", "bench.gpu_library"), limit_s=300)
    verify = (sys.executable, "-m", "beit3_fast", "verify", "--kernels", "--json")
    yield Step("verify", verify, ("library",), 400)
    for name, test in CUDA_TESTS.items():
        yield _tests(f"parity-{name}", (f"tests/ops/{test}.py",), *QUICK, limit_s=200)
    ops = ("expert_linear", "shared_attention")
    yield _triton_tests("parity-triton", *ops, limit_s=300, chosen=QUICK)
    yield _tests("graphs", GRAPH_TESTS, "-k", "graph", limit_s=200)
    yield _tests("races-cuda", ("tests/ops/test_cuda_races.py",), limit_s=300)


def _measurements(device: str, out: Path) -> Iterator[Step]:
    on, right = ("--device", device), ("parity-cuda", "parity-triton")
    yield from _figures(on, out, right, {})
    for batch in ("1", "64"):
        for impl in ("auto", "cuda", "composite"):
            what = (*on, "--batch", batch, "--impl", impl)
            needs = (*right, "parity-cuda-decoding")
            yield Step(f"bench-decode-step-{impl}-{batch}", (*DECODE, *what), needs, 120)
    for own in WORKLOADS:
        yield _bench(on, out, *own, RUNTIMES, "", (*right, "parity-cuda-float8"), 200)
    training = ("linear_gradients", "cross_entropy")
    yield _triton_tests("parity-triton-training", *training, limit_s=300, chosen=QUICK)
    trained = ("parity-triton", "parity-triton-training")
    for own in TRAINING:
        runtimes = ("beit3_fast", "beit3_fast-composite", "torchscale")
        yield _bench(on, out, *own, runtimes, "", trained, 300)
    for own in WORKLOADS:
        yield _bench(on, out, *own, COMPILED, "-compiled", right, 400)
    for own in TRAINING:
        yield _bench(on, out, *own, COMPILED_TRAINING, "-compiled", trained, 500)


def _bench(
    on: tuple[str, ...],
    out: Path,
    workload: str,
    batch: str,
    runtimes: tuple[str, ...],
    suffix: str,
    needs: tuple[str, ...],
    limit_s: float,
) -> Step:
    name = f"bench-{workload.replace('/', '-')}-{batch}{suffix}"
    what = ("--workloads", workload, "--batch", batch, "--dtypes", "bf16")
    options = (*on, *what, "--runtimes", *runtimes, "--out", str(out / name))
    return Step(name, (*BENCH, *options), needs, limit_s)


def _searches() -> Iterator[Step]:
    """Long matrices, races and the sanitizer: no step waits for them."""
    for name, test in CUDA_TESTS.items():
        yield _tests(f"every-{name}", (f"tests/ops/{test}.py",), *EVERY)
    yield _tests("every-cuda-model", (CUDA_MODEL_TESTS,), *EVERY)
    for test in TRITON_TESTS:
        yield _triton_tests(f"every-triton-{test}", test, limit_s=530, chosen=EVERY)
    yield _tests("races-triton", ("tests/ops/test_triton_races.py",), *EVERY)
    uncached = ON_GPU | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *PYTEST)
        for name, test in CUDA_TESTS.items():
            own = (*command, f"tests/ops/{test}.py", "-k", SANITIZED_CUDA[name])
            yield Step(f"{tool}-{name}", own, ("library",), environment=uncached)
        files = [f"tests/ops/test_triton_{test}.py" for test in TRITON_TESTS[:6]]
        every = (*command, *files, "-k", SANITIZED)
        yield Step(f"{tool}-triton", every, ("library",), environment=uncached)


def _dry_run(device: str, out: Path) -> Iterator[Step]:
    one = (*QUICK, "-k", "one")
    chosen = {"cuda": one, "cuda-float8": one, "cuda-decoding": (*QUICK, "-k", "head_top_k")}
    for name, test in CUDA_TESTS.items():
        yield Step(f"parity-{name}", (*PYTEST, f"tests/ops/{test}.py", *chosen[name]))
    files = tuple(f"tests/ops/test_triton_{test}.py" for test in TRITON_TESTS[:2])
    yield Step("parity-triton", (*PYTEST, *files, *one))
    yield Step("graphs", (*PYTEST, *GRAPH_TESTS, "-k", "captions"))
    yield Step("races-triton", (*PYTEST, "tests/ops/test_triton_races.py", "-k", "causal"))
    right = ("parity-cuda", "parity-triton")
    small = ("--workloads", "image/tiny/32", "train-vqa/tiny/32", "--batch", "1")
    bench = (*BENCH, "--device", device, "--quick", "--dtypes", "fp32", *small)
    runtimes = ("--runtimes", "beit3_fast", "torchscale", "--out", str(out / "bench"))
    yield Step("bench", (*bench, *runtimes), right)
    yield Step("bench-decode-step", (*DECODE, "--model", TINY, "--words", "3"), right)
    yield from _figures(("--device", device, "--small"), out, right, {"TRITON_INTERPRET": "1"})


def _figures(
    options: tuple[str, ...], out: Path, needs: tuple[str, ...], environment: dict[str, str]
) -> Iterator[Step]:
    command = (sys.executable, "-m", "bench.micro.figures")
    for name in FIGURES:
        own = (*command, name, *options, "--out", str(out / f"figures-{name}.json"))
        yield Step(f"figures-{name}", own, needs, 200, environment)
