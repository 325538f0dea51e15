"""All that an hour on a GPU should give, one step after the other, in one folder to commit.

    python -m bench.gpu                          # make gpu
    python -m bench.gpu --only races             # steps whose name holds a word
    python -m bench.gpu --device cpu --dry-run   # the same steps in small, in the interpreter

Parity on the device first; the benchmark runs only when every step before it passed. Each step takes under nine
minutes, leaves its output in DIR/STEP.log and its outcome in DIR/steps.json, and is not repeated once it passed: a
run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 530
LOG_BYTES = 2_000_000
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "--tb=short")
KERNEL_TESTS = (
    "expert_linear",
    "shared_attention",
    "linear_gradients",
    "cross_entropy",
    "registration",
    "model",
    "tiles",
    "dispatch",
)
WORKLOADS = {
    "image/base/224": "256",
    "image/large/224": "256",
    "vqa/base/480": "64",
    "retrieval-text/base/384": "256",
}
RUNTIMES = (
    "beit3_fast",
    "beit3_fast-cuda",
    "beit3_fast-float8",
    "beit3_fast-triton",
    "torchscale",
    "torchscale-compiled",
    "timm",
)
# A step of captions beside its memory floor.
DECODE = (sys.executable, "-m", "bench.decode_step")
TINY = "beit3_tiny_patch16_32_captioning"
# One small case for each kernel; the sanitizer is some 20 times slower.
SANITIZED = "(one and row) or (mixed and 2x88) or descriptors"
SANITIZED_CUDA = "three or one or mixed or rows"
# The tests of the CUDA kernels; without a GPU their binding runs in front of plain loops.
CUDA_TESTS = "tests/ops/test_cuda_binding.py"
FLOAT8_TESTS = "tests/ops/test_cuda_float8_ops.py"
CUDA_DECODING_TESTS = "tests/ops/test_cuda_decoding_binding.py"
GRAPH_TESTS = ("tests/model/test_capture.py", "tests/model/test_step_graph.py")


@dataclass(frozen=True)
class Step:
    """A command, and whether it waits until every step before it has passed."""

    name: str
    command: tuple[str, ...]
    needs_all: bool = False
    environment: dict[str, str] = field(default_factory=dict)


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
    decoding = ("-m", "not full", "-k", "head_top_k") if dry_run else chosen
    plan.append(Step("parity-cuda-decoding", (*PYTEST, CUDA_DECODING_TESTS, *decoding)))
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
            files = [f"tests/ops/test_triton_{name}.py" for name in KERNEL_TESTS[:4]]
            command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *PYTEST)
            uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            plan.append(Step(tool, (*command, *files, "-k", SANITIZED), False, uncached))
            own = (*command, CUDA_TESTS, "-k", SANITIZED_CUDA)
            plan.append(Step(f"{tool}-cuda", own, False, uncached))
            rounded = (*command, FLOAT8_TESTS, "-k", "left or model")
            plan.append(Step(f"{tool}-float8", rounded, False, uncached))
            own = (*command, CUDA_DECODING_TESTS, "-k", "not captions and not refuses")
            plan.append(Step(f"{tool}-cuda-decoding", own, False, uncached))
    bench = (sys.executable, "bench/run.py", "--device", device)
    if dry_run:
        small = ("--quick", "--workloads", "image/base/224", "--batch", "1", "--dtypes", "fp32")
        runtimes = ("--runtimes", "beit3_fast", "torchscale")
        plan.append(Step("bench", (*bench, *small, *runtimes, "--out", str(out / "bench")), True))
        plan.append(Step("bench-decode-step", (*DECODE, "--model", TINY, "--words", "3"), True))
    else:
        for batch in ("1", "64"):
            for impl in ("auto", "composite"):
                where = (*DECODE, "--device", device, "--batch", batch, "--impl", impl)
                plan.append(Step(f"bench-decode-step-{impl}-{batch}", where, True))
        for workload, batch in WORKLOADS.items():
            name = "bench-" + workload.replace("/", "-")
            what = ("--workloads", workload, "--batch", batch, "1", "--dtypes", "bf16")
            peers = ("--runtimes", *RUNTIMES, "--out", str(out / name))
            plan.append(Step(name, (*bench, *what, *peers), True))
    return plan


def run_step(step: Step, out: Path) -> dict[str, Any]:
    """Runs one step; its outcome is "passed", "failed", "out of time" or "not there: PROGRAM"."""
    if shutil.which(step.command[0]) is None:
        return {"outcome": f"not there: {step.command[0]}", "seconds": 0.0}
    log, start = out / f"{step.name}.log", time.monotonic()
    with log.open("wb") as file:
        try:
            code = subprocess.run(
                step.command,
                cwd=ROOT,
                env=dict(os.environ, **step.environment),
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
                check=False,
            ).returncode
            outcome = "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
    text = log.read_bytes()
    if len(text) > LOG_BYTES:
        log.write_bytes(text[: LOG_BYTES // 2] + b"\n...\n" + text[-LOG_BYTES // 2 :])
    return {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}


def run_all(plan: list[Step], out: Path) -> int:
    """Runs what has not passed yet; 1 where a step did not pass."""
    out.mkdir(parents=True, exist_ok=True)
    record = out / "steps.json"
    done: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    for place, step in enumerate(plan):
        if done.get(step.name, {}).get("outcome") == "passed":
            print(f"== {step.name}: passed before", flush=True)
            continue
        failed = [own.name for own in plan[:place] if done[own.name]["outcome"] in _NOT_PASSED]
        if step.needs_all and failed:
            done[step.name] = {"outcome": f"waits for {', '.join(failed)}", "seconds": 0.0}
        else:
            print(f"== {step.name}: {' '.join(step.command)}", flush=True)
            done[step.name] = run_step(step, out)
        print(f"== {step.name}: {done[step.name]['outcome']}", flush=True)
        record.write_text(json.dumps(done, indent=2) + "\n")
    return 0 if all(done[step.name]["outcome"] == "passed" for step in plan) else 1


_NOT_PASSED = ("failed", "out of time")


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a step did not pass."""
    parser = argparse.ArgumentParser(description="Parity, races and benchmark on a GPU.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dry-run", action="store_true", help="every step in small")
    parser.add_argument("--only", default="", help="steps whose name holds this")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "gpu")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("there is no CUDA device; --device cpu --dry-run goes through the steps")
    plan = steps(options.device, options.dry_run, options.out)
    plan = [step for step in plan if options.only in step.name]
    return run_all(plan, options.out)


if __name__ == "__main__":
    sys.exit(main())
