"""The moments of rows, in CUDA C++ on the CPU: against fp64, and only where they are asked for."""

from __future__ import annotations

import ctypes
from functools import cache

import emulated
import pytest
import torch
from torch import Tensor

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class Call(ctypes.Structure):
    """RowStatistics of csrc/cuda/row_statistics.h."""

    _fields_ = (
        ("element", ctypes.c_int32),
        ("x", _POINTER),
        ("x_stride", _SIZE),
        ("rows", _POINTER),
        ("parts", _POINTER),
        ("num_rows", _SIZE),
        ("features", _SIZE),
    )


@cache
def library() -> ctypes.CDLL:
    own = ctypes.CDLL(str(emulated.library("emulated_statistics")))
    own.emulate_row_statistics.restype = ctypes.c_char_p
    return own


def run(x: Tensor, rows: Tensor | None, blocks: int, order: int = 0) -> Tensor:
    """fp32 [M, 2]; NaN in rows that were not asked for."""
    parts = torch.full((len(x), 2), torch.nan)
    call = Call(
        element=(torch.bfloat16, torch.float16).index(x.dtype),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        rows=None if rows is None else rows.data_ptr(),
        parts=parts.data_ptr(),
        num_rows=len(x) if rows is None else len(rows),
        features=x.shape[1],
    )
    fault = library().emulate_row_statistics(ctypes.byref(call), blocks, order, 1)
    assert fault is None, fault
    return parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("features", [8, 72, 256, 264, 768])
@pytest.mark.parametrize("count", [1, 7, 9])
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_moments(count: int, features: int, dtype: torch.dtype, shift: float) -> None:
    memory = torch.full((count, features + 8), torch.nan, dtype=dtype)
    x = memory[:, :features].copy_(torch.randn(count, features) + shift)
    parts = run(x, None, blocks=1 + count % 2, order=features % 3)
    mean = x.double().mean(1)
    squares = (x.double() - mean[:, None]).square().sum(1)
    torch.testing.assert_close(parts[:, 0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts[:, 1].double(), squares, rtol=1e-5, atol=1e-6)


def test_only_named_rows_are_read_and_written() -> None:
    x = torch.full((9, 16), torch.nan, dtype=torch.bfloat16)
    rows = torch.tensor([7, 2, 4, 0, 8])
    x[rows] = torch.randn(5, 16).bfloat16()
    parts = run(x, rows, blocks=1)
    assert not parts[rows].isnan().any()
    others = torch.ones(9, dtype=torch.bool)
    others[rows] = False
    assert parts[others].isnan().all()
    torch.testing.assert_close(parts[rows, 0], x[rows].float().mean(1))
