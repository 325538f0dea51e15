"""The CUDA kernels of products in 8 bits on the CPU, on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import emulated
import torch
from emulated_linear import _POINTER, _SIZE, ORDERS, _Call, guarded, untouched
from torch import Tensor

from beit3_fast.float8 import BLOCK, E4M3, Quantized


class _Float8Call(ctypes.Structure):
    """Float8Linear of float8_linear.h."""

    _fields_ = (
        ("plain", _Call),
        ("x_scales", _POINTER),
        ("weight_scales", _POINTER),
        ("rounded", _POINTER),
        ("rounded_scales", _POINTER),
    )


class _RowsCall(ctypes.Structure):
    """QuantizeRows of float8_linear.h."""

    _fields_ = (
        ("x", _POINTER),
        ("x_stride", _SIZE),
        ("rounded", _POINTER),
        ("scales", _POINTER),
        ("parts", _POINTER),
        ("num_rows", _SIZE),
        ("features", _SIZE),
    )


class Weights(NamedTuple):
    """Those of all experts, as the kernels read them."""

    numbers: Tensor  # e4m3 [E, N, K]
    scales: Tensor  # fp32 [E, N]
    sums: Tensor | None  # fp32 [E, N]
    biases: Tensor | None  # fp32 [E, N]


class Result(NamedTuple):
    """What a launch leaves behind; rows that it was not asked for are NaN."""

    y: Tensor | None
    parts: Tensor
    rounded: Quantized


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(emulated.library("emulated_float8")))
    library.emulate_float8_linear.restype = ctypes.c_char_p
    library.emulate_float8_linear.argtypes = (
        ctypes.POINTER(_Float8Call),
        *[ctypes.c_int] * 3,
        ctypes.c_uint64,
    )
    library.emulate_quantize_rows.restype = ctypes.c_char_p
    library.emulate_quantize_rows.argtypes = (
        ctypes.POINTER(_RowsCall),
        *[ctypes.c_int] * 2,
        ctypes.c_uint64,
    )
    return library


def _own() -> ctypes.CDLL:
    return _library()


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def empty_rounded(count: int, columns: int) -> tuple[Quantized, Tensor]:
    """A place for rows in 8 bits, filled with NaN and with NaN behind them, and the whole memory of the numbers."""
    memory = torch.full((count * columns + 64,), 127, dtype=torch.uint8).view(E4M3)
    scales = torch.full((count, -(-columns // BLOCK)), torch.nan)
    return Quantized(memory[: count * columns].view(count, columns), scales), memory


def float8_linear(
    x: Quantized,
    weights: Weights,
    residual: Tensor | None,
    bounds: Sequence[int],
    eps: float,
    activation: str,
    *,
    statistics: tuple[Tensor, int] | None = None,
    stores: bool = True,
    order: str = "eager",
    bands: int = 2,
    processors: int = 2,
    seed: int = 0,
) -> Result:
    """``stores``: whether y in bfloat16 is wanted, too. Raises RuntimeError with the fault."""
    count, out = x.numbers.shape[0], weights.numbers.shape[1]
    y, y_memory = guarded(torch.full((count, out), torch.nan, dtype=torch.bfloat16))
    y_parts = torch.full((count, -(-out // BLOCK), 2), torch.nan)
    rounded, memory = empty_rounded(count, out)
    own_residual = None if residual is None else guarded(residual, gap=16)[0]
    parts, part_width = statistics if statistics is not None else (None, 0)
    plain = _Call(
        element=0,
        gelu=activation == "gelu",
        x=_pointer(x.numbers),
        weights=_pointer(weights.numbers),
        sums=_pointer(weights.sums),
        biases=_pointer(weights.biases),
        parts=_pointer(parts),
        num_parts=0 if parts is None else parts.shape[1],
        part_width=part_width,
        eps=eps,
        residual=_pointer(own_residual),
        residual_stride=0 if own_residual is None else own_residual.stride(0),
        y=_pointer(y) if stores else None,
        y_stride=y.stride(0),
        y_parts=_pointer(y_parts),
        num_rows=count,
        in_features=x.numbers.shape[1],
        out_features=out,
        num_experts=len(bounds) - 1,
        bounds=(_SIZE * 4)(*bounds),
    )
    beside = (x.scales, weights.scales, *rounded)
    call = _Float8Call(plain, *map(_pointer, beside))
    numbers = (bands, processors, ORDERS.index(order), seed)
    _raise(_own().emulate_float8_linear(ctypes.byref(call), *numbers))
    assert untouched(y, y_memory), "the kernel wrote around y"
    assert memory[count * out :].isnan().all(), "the kernel wrote behind the rounded rows"
    return Result(y if stores else None, y_parts, rounded)


def quantize_rows(x: Tensor, blocks: int = 2, order: str = "eager") -> tuple[Quantized, Tensor]:
    """The rows in 8 bits, and their statistics in parts of 128 columns. Raises RuntimeError with the fault."""
    count, columns = x.shape
    own, _ = guarded(x)
    rounded, memory = empty_rounded(count, columns)
    parts = torch.full((count, -(-columns // BLOCK), 2), torch.nan)
    places: Any = map(_pointer, (*rounded, parts))
    call = _RowsCall(_pointer(own), own.stride(0), *places, count, columns)
    _raise(_own().emulate_quantize_rows(ctypes.byref(call), blocks, ORDERS.index(order), 1))
    assert memory[count * columns :].isnan().all(), "the kernel wrote behind the rounded rows"
    return rounded, parts


def _raise(fault: bytes | None) -> None:
    if fault is not None:
        raise RuntimeError(fault.decode())
