"""The calls of the self-check leave no shipped tile out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_cases import DEVICE

from beit3_fast.kernels import _tiles
from beit3_fast.ops import kernel_cases

jit = pytest.importorskip("triton.runtime.jit", reason="triton is not installed")


def test_the_self_check_meets_every_class_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which tile is chosen is noted; nothing is launched."""
    met = set()

    def choose(tile: Any, op: str, own_class: str, name: str) -> Any:
        met.add((op, own_class))
        return real(tile, op, own_class, name)

    real = _tiles.choose
    monkeypatch.setattr(_tiles, "choose", choose)
    monkeypatch.setattr(jit.KernelInterface, "__getitem__", lambda *_: lambda *_, **__: None)
    for dtype in (torch.float16, torch.float32):
        for check in kernel_cases.CASES.values():
            check(dtype, DEVICE)
    assert met == {(op, own) for op, classes in _tiles.CLASSES.items() for own in classes}
