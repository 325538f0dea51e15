"""Peak memory of one forward beyond the parameters, each figure from a process of its own.

    python -m bench.memory '{"runtime": "torchscale", "workload": "vqa/base/480", ...}'

prints one line of JSON. On a CPU the figure is the peak of the process's anonymous memory, less what it
had before the model was built, less the parameters and the inputs. So weights packed a second time count,
whenever that happens, and the pages of libraries do not. A tiny model of the same kind runs first: thread
stacks and the tables of the libraries belong to the process, not to the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from beit3_fast.errors import Beit3FastError
from beit3_fast.ops.packed_weight import PackedWeight
from bench.baselines import RUNTIMES
from bench.runtime import Weights
from bench.tasks import Inputs
from bench.torchscale_heads import MODELS
from bench.workloads import Workload, move, parse_workload, step

_MIB = 1 << 20
# Tensors beyond 1 MiB go back to the system when freed, so that the peak is of live memory, not of the
# allocator's habits. The same for every runtime.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(_MIB), "MALLOC_TRIM_THRESHOLD_": str(_MIB)}


class MemoryProbeFailed(Beit3FastError, RuntimeError):
    """The process that measures memory did not finish."""


@dataclass(frozen=True)
class Probe:
    """What to measure."""

    runtime: str
    workload: str
    dtype: str
    batch: int
    threads: int
    device: str = "cpu"


def measure_peak(probe: Probe, timeout: float = 600.0) -> float:
    """MiB beyond the parameters, measured in a fresh process.

    Raises:
        MemoryProbeFailed: the process failed or took longer than `timeout` seconds.
    """
    command = [sys.executable, "-m", "bench.memory", json.dumps(asdict(probe))]
    environment = {**os.environ, **_ALLOCATOR}
    root = Path(__file__).resolve().parent.parent
    what = f"the memory of {probe.runtime} on {probe.workload}"
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise MemoryProbeFailed(f"{what} was not measured: no answer in {timeout:.0f} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MemoryProbeFailed(f"{what} was not measured: exit code {done.returncode}, {last}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["peak_memory_mib"])


def _main(arguments: list[str]) -> int:
    probe = Probe(**json.loads(arguments[0]))
    torch.set_num_threads(probe.threads)
    workload = parse_workload(probe.workload)
    device, dtype = torch.device(probe.device), getattr(torch, probe.dtype)
    _forward(probe.runtime, Workload(workload.task_name, "tiny", 32), 2, dtype, device)
    settle()
    before = 0 if device.type == "cuda" else _status("RssAnon")
    peak = _forward(probe.runtime, workload, probe.batch, dtype, device, before)
    print(json.dumps({"peak_memory_mib": round(peak / _MIB, 1)}))
    return 0


def _forward(
    runtime: str,
    workload: Workload,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    before: int = 0,
) -> float:
    """Peak bytes beyond `before`, the parameters and the inputs.

    One sample runs first: what is made on first use, such as packed weights, must be there in full
    when the batch runs.
    """
    model = RUNTIMES[runtime].build(workload, _cheap_weights(workload), dtype, device)
    one, inputs = (move(workload.inputs(n), dtype, device) for n in (1, batch))
    tensors = (*model.parameters(), *model.buffers(), *one.values(), *inputs.values())
    held = sum(map(_bytes, tensors))
    settle()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _steps(model, workload, one, inputs)
        return float(torch.cuda.max_memory_allocated(device) - held)
    with _PeakAnonymous() as peak:
        _steps(model, workload, one, inputs)
    return float(peak.bytes - before - held)


def _bytes(tensor: torch.Tensor) -> int:
    memory = tensor.packed if isinstance(tensor, PackedWeight) else tensor
    return memory.numel() * memory.element_size()


def _steps(model: nn.Module, workload: Workload, *batches: Inputs) -> None:
    for inputs in batches:
        step(model, workload, inputs)


def _cheap_weights(workload: Workload) -> Weights:
    """A constant for every weight, stored once: memory does not depend on the values."""
    with torch.device("meta"):
        shapes = MODELS[workload.task.model](workload.config).state_dict()
    return {name: torch.tensor(0.02).expand(t.shape) for name, t in shapes.items()}


def settle() -> None:
    """Gives freed memory back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise MemoryProbeFailed(f"/proc/self/status has no line {key}")


class _PeakAnonymous:
    """The largest anonymous resident memory while the block runs, in `bytes` after it.

    The kernel keeps the peak of all resident memory; pages of files only come, so those that are there in
    the end are taken off. Where the kernel's mark cannot be reset, a thread looks every millisecond.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _PeakAnonymous:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            self.bytes = _status("VmHWM") - _status("RssFile") - _status("RssShmem")
        else:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, _status("RssAnon"))


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
