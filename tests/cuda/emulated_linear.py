"""expert_linear's CUDA kernels on the CPU, on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import emulated
import torch
from torch import Tensor

ORDERS = ("eager", "late", "random")
PART_WIDTH = 128
_GUARD = 64  # numbers around every tensor
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class _Call(ctypes.Structure):
    """ExpertLinear of expert_linear.h."""

    _fields_ = (
        ("element", ctypes.c_int32),
        ("gelu", ctypes.c_bool),
        ("x", _POINTER),
        ("x_stride", _SIZE),
        ("weights", _POINTER),
        ("sums", _POINTER),
        ("biases", _POINTER),
        ("parts", _POINTER),
        ("num_parts", _SIZE),
        ("part_width", _SIZE),
        ("eps", ctypes.c_float),
        ("residual", _POINTER),
        ("residual_stride", _SIZE),
        ("rows", _POINTER),
        ("z", _POINTER),
        ("y", _POINTER),
        ("y_stride", _SIZE),
        ("y_parts", _POINTER),
        ("num_rows", _SIZE),
        ("in_features", _SIZE),
        ("out_features", _SIZE),
        ("num_experts", _SIZE),
        ("bounds", _SIZE * 4),
        ("most_blocks", _SIZE),
    )


class Plan(NamedTuple):
    """LinearPlan of linear_tiles.h: bands of a tile (0: the portable kernel), tiles of a cluster down and across, shares of K."""

    bands: int = 2
    high: int = 1
    wide: int = 1
    shares: int = 1


HIGH = Plan()


class _Plan(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in Plan._fields)


class Result(NamedTuple):
    """What a launch leaves behind; rows that it was not asked for are NaN."""

    y: Tensor
    z: Tensor
    parts: Tensor


def guarded(t: Tensor, gap: int = 8) -> tuple[Tensor, Tensor]:
    """The same rows with NaN before, between and behind them, and the whole memory."""
    rows, columns = t.shape
    memory = torch.full((2 * _GUARD + rows * (columns + gap),), float("nan"), dtype=t.dtype)
    view = memory[_GUARD:].as_strided((rows, columns), (columns + gap, 1))
    return view.copy_(t), memory


def untouched(view: Tensor, memory: Tensor) -> bool:
    """Whether everything around the rows is still NaN."""
    around = torch.ones_like(memory, dtype=torch.bool)
    around[_GUARD:].as_strided(view.shape, view.stride()).fill_(False)
    return bool(memory[around].isnan().all())


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(emulated.library("emulated_linear")))
    library.emulate_expert_linear.restype = ctypes.c_char_p
    library.emulate_expert_linear.argtypes = (
        ctypes.POINTER(_Call),
        ctypes.POINTER(_Plan),
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_uint64,
    )
    return library


def plan(
    bounds: Sequence[int],
    inner: int,
    out: int,
    processors: int = 132,
    most_blocks: int = 4,
    gathered: bool = False,
) -> Plan:
    """How the launcher lays out a product."""
    call = _Call(
        in_features=inner,
        out_features=out,
        num_experts=len(bounds) - 1,
        bounds=(_SIZE * 4)(*bounds),
        rows=8 if gathered else None,
        most_blocks=most_blocks,
    )
    own = _Plan()
    _library().expert_linear_plan(ctypes.byref(call), processors, ctypes.byref(own))
    return Plan(*(getattr(own, name) for name in Plan._fields))


def expert_linear(
    x: Tensor,
    folded: Any,
    residual: Tensor | None,
    rows: Tensor | None,
    bounds: Sequence[int],
    eps: float,
    activation: str,
    *,
    statistics: tuple[Tensor, int] | None = None,
    order: str = "eager",
    plan: Plan = HIGH,
    clusters: int = 2,
    seed: int = 0,
) -> Result:
    """As in kernels/expert_linear.py, with z and the statistics of y.

    ``clusters``: how many share the work, of one block or more each. Raises RuntimeError with the fault.
    """
    out = folded.weights.shape[1]
    empty = torch.full((x.shape[0], out), float("nan"), dtype=x.dtype)
    (own_x, _), (y, y_memory), (z, z_memory) = guarded(x), guarded(empty), guarded(empty)
    y_parts = torch.full((x.shape[0], -(-out // PART_WIDTH), 2), float("nan"))
    own_residual = None if residual is None else guarded(residual, gap=16)[0]
    parts, part_width = statistics if statistics is not None else (None, 0)

    def pointer(t: Tensor | None) -> int | None:
        return None if t is None else t.data_ptr()

    call = _Call(
        element=0 if x.dtype == torch.bfloat16 else 1,
        gelu=activation == "gelu",
        x=own_x.data_ptr(),
        x_stride=own_x.stride(0),
        weights=folded.weights.data_ptr(),
        sums=pointer(folded.sums),
        biases=pointer(folded.biases),
        parts=pointer(parts),
        num_parts=0 if parts is None else parts.shape[1],
        part_width=part_width,
        eps=eps,
        residual=pointer(own_residual),
        residual_stride=0 if own_residual is None else own_residual.stride(0),
        rows=pointer(rows),
        z=z.data_ptr(),
        y=y.data_ptr(),
        y_stride=y.stride(0),
        y_parts=y_parts.data_ptr(),
        num_rows=x.shape[0],
        in_features=x.shape[1],
        out_features=out,
        num_experts=len(bounds) - 1,
        bounds=(_SIZE * 4)(*bounds),
    )
    library = _library()
    fault = library.emulate_expert_linear(
        ctypes.byref(call), ctypes.byref(_Plan(*plan)), clusters, ORDERS.index(order), seed
    )
    if fault is not None:
        raise RuntimeError(fault.decode())
    assert untouched(y, y_memory), "the kernel wrote around y"
    assert untouched(z, z_memory), "the kernel wrote around z"
    return Result(y, z, y_parts)
