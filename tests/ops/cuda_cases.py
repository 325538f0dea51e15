"""What every test of the CUDA kernels needs: the kernels themselves where a GPU runs them, else the binding alone.

On a CPU csrc/cuda_ops.cpp is compiled in front of plain loops (plain_launchers.cpp) instead of the kernels, whose own
sources tests/cuda/ runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_fast.ops import cuda_kernels, dispatch


def device_for(reason: str | None) -> str:
    """The GPU where nothing speaks against it, else the CPU and its stand-ins: unless BEIT3_FAST_TESTS_NEED_GPU is 1."""
    if reason is not None and os.environ.get("BEIT3_FAST_TESTS_NEED_GPU") == "1":
        raise RuntimeError(f"these tests are to run on a GPU, but its kernels cannot: {reason}")
    return "cuda" if reason is None else "cpu"


DEVICE = device_for(cuda_kernels.why_unavailable("cuda"))
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BINDINGS = ("cuda_ops.cpp", "cuda_decoding_ops.cpp")
# Sources of tests/cuda/ that emulated_launchers.cpp calls.
EMULATED = ("emulated_linear", "attention_host", "emulated_statistics", "emulated_decoding")
HEADERS = sorted(path for own in ("csrc", "csrc/cuda") for path in (ROOT / own).glob("*.h"))


def compiled(
    launchers: Sequence[str],
    namespace: str,
    links: Sequence[Path] = (),
    bindings: Sequence[str] = BINDINGS,
) -> Path:
    """Bindings in front of launchers, their ops in a namespace; kept under the name of their sources.

    Skips without a compiler.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("compiles the binding with a C++ compiler on Linux")
    sources = (*(ROOT / "csrc" / own for own in bindings), *(HERE / own for own in launchers))
    texts = b"".join(path.read_bytes() for path in (*sources, *HEADERS))
    digest = hashlib.sha256(texts + repr((torch.__version__, links)).encode()).hexdigest()[:16]
    path = ROOT / "build" / "cuda_binding" / f"{namespace}-{digest}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        torch_folder = Path(torch.__file__).parent
        command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(fresh)]
        command += [f"-DBEIT3_FAST_EMULATE_CUDA={namespace}"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}"]
        command += ["-isystem", str(torch_folder / "include"), *map(str, (*sources, *links))]
        command += [f"-L{torch_folder / 'lib'}", "-l:libtorch_cpu.so"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        os.replace(fresh, path)
    return path


@cache
def ops() -> Any:
    """The launching ops of the binding on DEVICE."""
    if DEVICE == "cuda":
        return torch.ops.beit3_fast
    torch.ops.load_library(str(compiled(("plain_launchers.cpp",), "beit3_fast_plain")))
    return torch.ops.beit3_fast_plain


def take(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are taken by impl="cuda" and go to these ops."""

    def launch(kernel: str, first: Tensor, *arguments: Any, **options: Any) -> None:
        getattr(own, f"launch_{kernel}")(first, *arguments, 0, **options)

    monkeypatch.setattr(cuda_kernels, "launch", launch)
    monkeypatch.setattr(cuda_kernels, "why_unavailable", lambda device: None)
    dispatch.reset()


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Tensors on DEVICE are taken by impl="cuda"; returns the launching ops."""
    if DEVICE == "cpu":
        take(ops(), monkeypatch)
    yield ops()
    dispatch.reset()
