"""shared_attention's CUDA kernels on the CPU: their own sources, compiled against the emulator."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import emulated
import torch
from attention_cases import MASKS
from torch import Tensor

from beit3_fast.float8 import BLOCK, E4M3, Quantized
from beit3_fast.layout import TokenLayout

_OFFSETS = ("cu_vision", "cu_text", "cu_vision_q", "cu_text_q", "positions_q")
_SIZES = ("num_queries", "num_keys", "batch", "num_heads", "head_dim")


class Call(ctypes.Structure):
    """``SharedAttention`` of csrc/cuda/shared_attention.h."""

    _fields_ = (
        ("element", ctypes.c_int32),
        ("mask", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in "qkvo"),
        *((f"{name}_stride", ctypes.c_int64) for name in "qkvo"),
        ("lse", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("v_scales", ctypes.c_void_p),
        ("v_scales_stride", ctypes.c_int64),
        ("rounded", ctypes.c_void_p),
        ("rounded_scales", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in _OFFSETS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("longest_keys", ctypes.c_int64),
        ("longest_queries", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


class Result(NamedTuple):
    """What a launch leaves behind."""

    o: Tensor
    lse: Tensor
    parts: Tensor
    rounded: Quantized | None = None


EAGER, LATE, RANDOM = range(3)


class Launch(NamedTuple):
    """How a call is run: ``keys`` picks the kernel as the longest sample would; ``order`` and ``seed`` of events."""

    keys: int = 0
    processors: int = 2
    portable: bool = False
    order: int = RANDOM
    seed: int = 0


@cache
def library() -> ctypes.CDLL:
    built = ctypes.CDLL(str(emulated.library("attention_host")))
    run = built.emulate_shared_attention
    run.restype = ctypes.c_char_p
    run.argtypes = (ctypes.POINTER(Call), *[ctypes.c_int] * 3, ctypes.c_uint64)
    return built


def aligned(t: Tensor) -> Tensor:
    """The rows where the kernels take them: each at a multiple of 16 bytes."""
    return (
        t
        if t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0
        else t.clone(memory_format=torch.contiguous_format)
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    queries: TokenLayout | None,
    num_heads: int,
    mask: str,
    launch: Launch,
    scale: float | None = None,
    v_scales: Tensor | None = None,
    stores: bool = True,
) -> Result:
    """One emulated launch; outputs begin as NaN, as must stay what lies between o's rows and a row behind each.

    With ``v_scales`` the result is left in 8 bits as well, or without ``stores`` alone; o is then NaN.
    """
    own = layout if queries is None else queries
    q, k, v = (aligned(t) for t in (q, k, v))
    rows, width = q.shape
    o = torch.full((rows + 1, width + 8), torch.nan, dtype=q.dtype)
    lse = torch.full((rows + 1, num_heads), torch.nan)
    parts = torch.full((rows + 1, num_heads, 2), torch.nan)
    blocks = -(-width // BLOCK)
    numbers = torch.full((rows + 1, width), 127, dtype=torch.uint8).view(E4M3)
    scales = torch.full((rows + 1, blocks), torch.nan)
    tensors = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "parts": parts}
    tensors |= {"cu_vision": layout.cu_vision, "cu_text": layout.cu_text}
    tensors |= {"cu_vision_q": own.cu_vision, "cu_text_q": own.cu_text}
    if queries is not None and queries.positions is not None:
        tensors["positions_q"] = queries.positions
    if v_scales is not None:
        tensors |= {"v_scales": v_scales, "rounded": numbers, "rounded_scales": scales}
    places = {name: t.data_ptr() for name, t in tensors.items() if stores or name != "o"}
    head_dim = width // num_heads
    call = Call(
        element=(torch.bfloat16, torch.float16).index(q.dtype),
        mask=MASKS.index(mask),
        **places,
        v_scales_stride=0 if v_scales is None else v_scales.stride(0),
        **{f"{name}_stride": tensors[name].stride(0) for name in "qkvo"},
        num_queries=rows,
        num_keys=len(k),
        batch=layout.batch_size,
        num_heads=num_heads,
        head_dim=head_dim,
        longest_keys=max(layout.longest, launch.keys),
        longest_queries=own.longest,
        scale=head_dim**-0.5 if scale is None else scale,
    )
    complaint = library().emulate_shared_attention(ctypes.byref(call), *launch[1:])
    assert complaint is None, complaint
    assert all(bool(t.isnan().all()) for t in (o[:, width:], o[rows], lse[rows], parts[rows]))
    assert bool(numbers[rows].isnan().all())
    assert bool(scales[rows].isnan().all())
    rounded = None if v_scales is None else Quantized(numbers[:rows], scales[:rows])
    return Result(o[:rows, :width], lse[:rows], parts[:rows], rounded)
