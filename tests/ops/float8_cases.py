"""What tests of the kernels for 8 bits need: on a GPU the kernels, without one their sources in the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from cuda_cases import BINDINGS, EMULATED, compiled, device_for, take

from beit3_fast.ops import cuda_kernels, dispatch

DEVICE = device_for(cuda_kernels.obstacle("float8_linear", "cuda", torch.bfloat16, False))


@cache
def ops() -> Any:
    """The launching ops on DEVICE."""
    if DEVICE == "cuda":
        return torch.ops.beit3_fast
    emulated = pytest.importorskip("emulated")
    links = [emulated.library("emulated_float8")]
    names = (("emulated_float8_launchers.cpp",), "beit3_fast_float8")
    torch.ops.load_library(str(compiled(*names, links, bindings=("cuda_float8_ops.cpp",))))
    return torch.ops.beit3_fast_float8


@cache
def ops_of_a_model() -> Any:
    """Those of all kernels."""
    if DEVICE == "cuda":
        return torch.ops.beit3_fast
    emulated = pytest.importorskip("emulated")
    links = [emulated.library(name) for name in ("emulated_float8", *EMULATED)]
    launchers = ("emulated_float8_launchers.cpp", "emulated_launchers.cpp")
    bindings = ("cuda_float8_ops.cpp", *BINDINGS)
    torch.ops.load_library(str(compiled(launchers, "beit3_fast_float8_model", links, bindings)))
    return torch.ops.beit3_fast_float8_model


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Tensors on DEVICE are taken by impl="cuda"; returns the launching ops."""
    if DEVICE == "cpu":
        take(ops(), monkeypatch)
    yield ops()
    dispatch.reset()


@pytest.fixture
def model_on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As ``on_device``, with attention that may leave its result in 8 bits."""
    if DEVICE == "cpu":
        take(ops_of_a_model(), monkeypatch)
        monkeypatch.setattr(cuda_kernels, "attention_rounds", lambda device: True)
    yield ops_of_a_model()
    dispatch.reset()
