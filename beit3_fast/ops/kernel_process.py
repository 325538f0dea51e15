"""A check of a CUDA kernel in a process of its own, which may hang or break without harm to the caller's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from beit3_fast.parity import Parity

LIMIT_S = 120
_READY = "the GPU answers"
_CODE = "from beit3_fast.ops import kernel_process; kernel_process.report({!r}, {!r}, {!r})"


def run(kernel: str, dtype: str, index: int) -> tuple[str, str, Parity, float, bool]:
    """The fields of a ``kernel_check.Outcome`` for a check on a CUDA device.

    It is settled unless the process came to nothing before it touched a kernel.
    """
    start = time.perf_counter()
    parity, settled = _check(kernel, dtype, index)
    return kernel, dtype, parity, round(time.perf_counter() - start, 3), settled


def report(kernel: str, dtype: str, index: int) -> None:
    """Runs a check in this process and prints what came of it: the other end of ``run``."""
    from beit3_fast.ops import kernel_check

    torch.cuda.set_device(index)
    torch.zeros(1, device="cuda").item()
    print(_READY, flush=True)
    outcome = kernel_check.run_here(kernel, getattr(torch, dtype), "cuda")
    # A fault that a kernel left behind shows here at the latest.
    torch.cuda.synchronize()
    print(json.dumps({"parity": asdict(outcome.parity), "settled": outcome.settled}), flush=True)


def failed(reason: str) -> Parity:
    """The parity of what gave no numbers."""
    return Parity(float("nan"), float("nan"), float("nan"), False, reason)


def _check(kernel: str, dtype: str, index: int) -> tuple[Parity, bool]:
    code = _CODE.format(kernel, dtype, index)
    paths = os.pathsep.join(os.path.abspath(own) for own in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = failed(f"it did not come to an end within {LIMIT_S} s")
        return said, _READY in str(error.stdout)
    except OSError as error:
        return failed(f"it did not run: {error}"), False
    if done.returncode == 0:
        outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return Parity(**outcome["parity"]), outcome["settled"]
    last = ([own for own in done.stderr.splitlines() if own.strip()] or ["no word"])[-1]
    words = f"its process ended with status {done.returncode}: {last}"
    return failed(words), _READY in done.stdout
