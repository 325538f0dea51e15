"""What tests of the kernels for 8 bits need: on a GPU the kernels, without one their sources in the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from cuda_cases import ROOT, compiled, take

from beit3_fast.ops import cuda_kernels, dispatch

RUNS = cuda_kernels.obstacle("float8_linear", "cuda", torch.bfloat16, False) is None
DEVICE = "cuda" if RUNS else "cpu"


@cache
def ops() -> Any:
    """The launching ops on DEVICE."""
    if DEVICE == "cuda":
        return torch.ops.beit3_fast
    emulated = pytest.importorskip("emulated")
    source = ROOT / "tests" / "cuda" / "emulated_float8.cpp"
    links = [emulated.compiled(source, ("-shared", "-fPIC"), ".so")]
    names = ("emulated_float8_launchers.cpp", "beit3_fast_float8")
    torch.ops.load_library(str(compiled(*names, links, bindings=("cuda_float8_ops.cpp",))))
    return torch.ops.beit3_fast_float8


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Tensors on DEVICE are taken by impl="cuda"; returns the launching ops."""
    if DEVICE == "cpu":
        take(ops(), monkeypatch)
    yield ops()
    dispatch.reset()
