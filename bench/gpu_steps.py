"""The steps of ``make gpu``: parity, races and the sanitizer, then what is measured."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "--tb=short")
KERNEL_TESTS = (
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
# A step of bench/run.py each; the batches are those of the figures to reach.
WORKLOADS = (
    ("image/base/224", "256"),
    ("image/base/224", "1"),
    ("image/large/224", "256"),
    ("vqa/base/480", "64"),
    ("retrieval-text/base/384", "256"),
    ("train/base/224", "128"),
    ("train-vqa/base/480", "32"),
)
RUNTIMES = (
    "beit3_fast",
    "beit3_fast-cuda",
    "beit3_fast-float8",
    "beit3_fast-triton",
    "beit3_fast-composite",
    "torchscale",
    "torchscale-compiled",
    "torchscale-compiled-training",
    "timm",
)
FIGURES = ("products", "attention", "latency")
# A step of captions beside its memory floor.
DECODE = (sys.executable, "-m", "bench.decode_step")
TINY = "beit3_tiny_patch16_32_captioning"
# One small case for each kernel; the sanitizer is some 20 times slower. The last one has parts of rows to join.
SANITIZED = (
    "(one and row) or (mixed and 2x88) or descriptors or 5-64 or 27-88 or every_mask "
    "or (op_before and 0.0-3-)"
)
SANITIZED_CUDA = "three or one or mixed or rows"
BENCH = (sys.executable, "bench/run.py")
# The tests of the CUDA kernels; without a GPU their binding runs in front of plain loops.
CUDA_TESTS = "tests/ops/test_cuda_binding.py"
FLOAT8_TESTS = "tests/ops/test_cuda_float8_ops.py"
CUDA_DECODING_TESTS = "tests/ops/test_cuda_decoding_binding.py"
GRAPH_TESTS = ("tests/model/test_capture.py", "tests/model/test_step_graph.py")


SOURCES = ("beit3_fast", "kernels", "csrc")


@dataclass(frozen=True)
class Step:
    """A command, and whether it waits until every step that does not wait has passed."""

    name: str
    command: tuple[str, ...]
    needs_all: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """The folders whose files a passed step says something about."""
        return (*SOURCES, "tests" if "pytest" in self.command else "bench")


def steps(device: str, dry_run: bool, out: Path) -> list[Step]:
    """What is to be done on a device."""
    chosen = ("-m", "not full", "-k", "one") if dry_run else ("-m", "full or not full")
    plan = [
        Step(f"parity-{name}", (*PYTEST, f"tests/ops/test_triton_{name}.py", *chosen))
        for name in KERNEL_TESTS
        if not dry_run or name in KERNEL_TESTS[:2]
    ]
    plan.append(Step("parity-cuda", (*PYTEST, CUDA_TESTS, *chosen)))
    plan.append(Step("parity-float8", (*PYTEST, FLOAT8_TESTS, *chosen)))
    heads = ("-m", "not full", "-k", "head_top_k") if dry_run else chosen
    plan.append(Step("parity-cuda-decoding", (*PYTEST, CUDA_DECODING_TESTS, *heads)))
    plan.append(Step("graphs", (*PYTEST, *GRAPH_TESTS, "-k", "captions" if dry_run else "graph")))
    if device == "cuda":
        verify = (sys.executable, "-m", "beit3_fast", "verify", "--kernels", "--json")
        plan.append(Step("verify", verify))
    races = (*PYTEST, "tests/ops/test_triton_races.py")
    every = ("-m", "full or not full")
    plan.append(Step("races", (*races, *(("-k", "causal") if dry_run else every))))
    if device == "cuda":
        plan.append(Step("races-cuda", (*PYTEST, "tests/ops/test_cuda_races.py")))
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        if device == "cuda":
            files = [f"tests/ops/test_triton_{name}.py" for name in KERNEL_TESTS[:6]]
            command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *PYTEST)
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            plan.append(Step(tool, (*command, *files, "-k", SANITIZED), False, uncached))
            cuda = (*command, CUDA_TESTS, "-k", SANITIZED_CUDA)
            plan.append(Step(f"{tool}-cuda", cuda, False, uncached))
            rounded = (*command, FLOAT8_TESTS, "-k", "left or model")
            plan.append(Step(f"{tool}-float8", rounded, False, uncached))
            decoding = (*command, CUDA_DECODING_TESTS, "-k", "not captions and not refuses")
            plan.append(Step(f"{tool}-cuda-decoding", decoding, False, uncached))
    return plan + (_dry_measurements(device, out) if dry_run else _measurements(device, out))


def _dry_measurements(device: str, out: Path) -> list[Step]:
    small = ("--workloads", "image/tiny/32", "train-vqa/tiny/32", "--batch", "1")
    bench = (*BENCH, "--device", device, "--quick", "--dtypes", "fp32", *small)
    runtimes = ("--runtimes", "beit3_fast", "torchscale", "--out", str(out / "bench"))
    return [
        Step("bench", (*bench, *runtimes), True),
        Step("bench-decode-step", (*DECODE, "--model", TINY, "--words", "3"), True),
        *_figures((*("--device", device), "--small"), out, {"TRITON_INTERPRET": "1"}),
    ]


def _measurements(device: str, out: Path) -> list[Step]:
    on, plan = ("--device", device), []
    for batch in ("1", "64"):
        for impl in ("auto", "composite"):
            what = (*on, "--batch", batch, "--impl", impl)
            plan.append(Step(f"bench-decode-step-{impl}-{batch}", (*DECODE, *what), True))
    plan += _figures(on, out, {})
    for workload, batch in WORKLOADS:
        name = f"bench-{workload.replace('/', '-')}-{batch}"
        what = ("--workloads", workload, "--batch", batch, "--dtypes", "bf16")
        peers = ("--runtimes", *RUNTIMES, "--out", str(out / name))
        plan.append(Step(name, (*BENCH, *on, *what, *peers), True))
    return plan


def _figures(options: tuple[str, ...], out: Path, environment: dict[str, str]) -> list[Step]:
    command = (sys.executable, "-m", "bench.micro.figures")
    return [
        Step(
            f"figures-{name}",
            (*command, name, *options, "--out", str(out / f"figures-{name}.json")),
            True,
            environment,
        )
        for name in FIGURES
    ]
