"""The CUDA kernels of captioning steps as the ops call them: inference, in bf16 and fp16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit3_fast.ops import cuda_kernels

MAX_COUNT = 32  # of a row, as in csrc/cuda/head_top_k.h
_TILE_CLASSES = 256
_STEP = 8


def head_misfit(features: int, classes: int, count: int) -> str | None:
    """Why a head of this size is none for the kernels, or None."""
    if features % _STEP or not features:
        return f"takes features in multiples of {_STEP}, got {features}"
    if count > min(MAX_COUNT, classes):
        return f"names at most {min(MAX_COUNT, classes)} classes a row, got {count}"
    return None


@torch.library.custom_op("beit3_fast::cuda_cached_attention", mutates_args=("k", "v"))
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    samples: Tensor | None,
    new_k: Tensor | None,
    new_v: Tensor | None,
    place: Tensor | None,
    first: int,
    front: int,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Rows o and their statistics, fp32 [S * n, H, 2] of each head. As ``beit3_fast.ops.cached_attention``.

    ``samples`` int32 [S], None for one of each in order; ``new_k`` and ``new_v`` are written into k and v first, from ``place`` int64 [1] on, without it from ``first`` on.
    """
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    size = (q.shape[0] * q.shape[1], num_heads, 2)
    parts = torch.empty(size, dtype=torch.float32, device=q.device)
    if o.numel():
        q, *own = map(cuda_kernels.aligned, (q, k, v))
        if new_k is not None and new_v is not None:
            new_k, new_v = cuda_kernels.aligned(new_k), cuda_kernels.aligned(new_v)
        seen = seen if seen.stride(2) == 1 else seen.contiguous()
        tail = (seen, samples, new_k, new_v, place, first, front, num_heads, scale, o, parts)
        cuda_kernels.launch("decode_attention", q, *own, *tail)
        for cache, written in zip((k, v), own, strict=True):
            if written is not cache and new_k is not None:
                cache.copy_(written)
    return o, parts


@cached_attention.register_fake
def _(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    size = (q.shape[0] * q.shape[1], arguments[-2], 2)
    return q.new_empty(q.shape), q.new_empty(size, dtype=torch.float32)


@torch.library.custom_op("beit3_fast::cuda_head_top_k", mutates_args=())
def head_top_k(
    x: Tensor, weight: Tensor, bias: Tensor | None, allowed: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """As ``beit3_fast.ops.head_top_k``."""
    rows, tiles = len(x), -(-len(weight) // _TILE_CLASSES)
    peaks = torch.empty(rows, tiles, 2, dtype=torch.float32, device=x.device)
    best = torch.empty(rows, tiles, count, dtype=torch.int64, device=x.device)
    log_p = torch.empty(rows, count, dtype=torch.float32, device=x.device)
    ids = torch.empty(rows, count, dtype=torch.int64, device=x.device)
    if rows:
        weight = cuda_kernels.aligned(weight.contiguous())
        bias = None if bias is None else bias.contiguous()
        allowed = None if allowed is None else allowed.contiguous()
        tail = (weight, bias, allowed, peaks, best, log_p, ids)
        cuda_kernels.launch("head_top_k", cuda_kernels.aligned(x), *tail)
    return log_p, ids


@head_top_k.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, allowed: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    size = (x.shape[0], count)
    return x.new_empty(size, dtype=torch.float32), x.new_empty(size, dtype=torch.int64)
