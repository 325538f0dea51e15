"""The kernels of decoding steps on the CPU: their own sources, compiled against the emulator."""

from __future__ import annotations

import ctypes
from functools import cache

import emulated
import torch
from torch import Tensor

EAGER, LATE, RANDOM = range(3)
TILE_CLASSES = 256  # HeadTopK::kTileClasses
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class Attention(ctypes.Structure):
    """``DecodeAttention`` of csrc/cuda/decode_attention.h."""

    _fields_ = (
        ("element", ctypes.c_int32),
        *((name, _POINTER) for name in (*"qkvo", "parts")),
        *((f"{name}_{step}", _SIZE) for name, step in (("q", "sequence"), ("q", "stride"))),
        *((f"{name}_{step}", _SIZE) for name in "kv" for step in ("sample", "stride")),
        ("seen", _POINTER),
        ("seen_sequence", _SIZE),
        ("seen_stride", _SIZE),
        ("samples", _POINTER),
        *((f"new_{name}", _POINTER) for name in "kv"),
        *((f"new_{name}_{step}", _SIZE) for name in "kv" for step in ("sequence", "stride")),
        ("place", _POINTER),
        ("first", _SIZE),
        ("num_new", _SIZE),
        *(
            (name, _SIZE)
            for name in (
                "num_sequences",
                "num_rows",
                "num_keys",
                "front",
                "num_heads",
                "head_dim",
            )
        ),
        ("scale", ctypes.c_float),
    )


class Head(ctypes.Structure):
    """``HeadTopK`` of csrc/cuda/head_top_k.h."""

    _fields_ = (
        ("element", ctypes.c_int32),
        ("x", _POINTER),
        ("x_stride", _SIZE),
        *((name, _POINTER) for name in ("weight", "bias", "allowed")),
        *((name, _POINTER) for name in ("peaks", "best", "log_p", "ids")),
        *((name, _SIZE) for name in ("num_rows", "features", "classes", "count")),
    )


@cache
def library() -> ctypes.CDLL:
    built = ctypes.CDLL(str(emulated.library("emulated_decoding")))
    for run in (built.emulate_decode_attention, built.emulate_head_top_k):
        run.restype = ctypes.c_char_p
    return built


def _element(tensor: Tensor) -> int:
    return (torch.bfloat16, torch.float16).index(tensor.dtype)


def assert_moments(heads: Tensor, parts: Tensor) -> None:
    """``parts`` hold mean and sum of squared deviations of each head as it was rounded."""
    mean = heads.mean(2)
    squares = (heads - mean[..., None]).square().sum(2)
    for mine, expected in zip(parts.unbind(2), (mean, squares), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    num_heads: int,
    *,
    front: int = 0,
    samples: list[int] | None = None,
    new: tuple[Tensor, Tensor, int | Tensor] | None = None,
    processors: int = 1,
    order: int = RANDOM,
    seed: int = 0,
    scale: float | None = None,
) -> Tensor:
    """One emulated launch, operands as those of ``cached_attention``; a row of NaN behind o must stay so.

    ``new``: keys, values, and the place from which on they are written into the cache.
    """
    sequences, rows, width = q.shape
    o = torch.full((sequences * rows + 1, width), torch.nan, dtype=q.dtype)
    parts = torch.full((sequences * rows + 1, num_heads, 2), torch.nan)
    own = None if samples is None else torch.tensor(samples, dtype=torch.int32)
    call = Attention(
        element=_element(q),
        **{
            name: t.data_ptr()
            for name, t in {"q": q, "k": k, "v": v, "o": o, "parts": parts}.items()
        },
        q_sequence=q.stride(0),
        q_stride=q.stride(1),
        k_sample=k.stride(0),
        k_stride=k.stride(1),
        v_sample=v.stride(0),
        v_stride=v.stride(1),
        seen=seen.data_ptr(),
        seen_sequence=seen.stride(0),
        seen_stride=seen.stride(1),
        samples=None if own is None else own.data_ptr(),
        num_sequences=sequences,
        num_rows=rows,
        num_keys=k.shape[1],
        front=front,
        num_heads=num_heads,
        head_dim=width // num_heads,
        scale=(width // num_heads) ** -0.5 if scale is None else scale,
    )
    if new is not None:
        call.new_k, call.new_v, call.num_new = new[0].data_ptr(), new[1].data_ptr(), new[0].shape[1]
        call.new_k_sequence, call.new_k_stride = new[0].stride()[:2]
        call.new_v_sequence, call.new_v_stride = new[1].stride()[:2]
        if isinstance(new[2], Tensor):
            call.place = new[2].data_ptr()
        else:
            call.first = new[2]
    fault = library().emulate_decode_attention(
        ctypes.byref(call), processors, order, ctypes.c_uint64(seed)
    )
    assert fault is None, fault
    assert o[-1].isnan().all()
    assert parts[-1].isnan().all()
    assert_moments(o[:-1].unflatten(1, (num_heads, -1)).double(), parts[:-1].double())
    return o[:-1].view(sequences, rows, width)


def choose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: int,
    allowed: Tensor | None = None,
    *,
    order: int = RANDOM,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log probabilities and ids of an emulated launch; a row behind each result must stay as it was."""
    rows, tiles = len(x), -(-len(weight) // TILE_CLASSES)
    log_p, ids = torch.full((rows + 1, count), torch.nan), torch.full((rows + 1, count), -1)
    peaks = torch.full((rows + 1, tiles, 2), torch.nan)
    best = torch.full((rows + 1, tiles, count), -1)
    given = {"x": x, "weight": weight, "bias": bias, "allowed": allowed}
    given |= {"peaks": peaks, "best": best, "log_p": log_p, "ids": ids}
    call = Head(
        element=_element(x),
        **{name: None if t is None else t.data_ptr() for name, t in given.items()},
        x_stride=x.stride(0),
        num_rows=rows,
        features=x.shape[1],
        classes=len(weight),
        count=count,
    )
    fault = library().emulate_head_top_k(ctypes.byref(call), order, ctypes.c_uint64(seed))
    assert fault is None, fault
    assert log_p[-1].isnan().all()
    assert peaks[-1].isnan().all()
    assert ids[-1].eq(-1).all()
    assert best[-1].eq(-1).all()
    return log_p[:-1], ids[:-1]
