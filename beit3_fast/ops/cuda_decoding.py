"""The CUDA kernels of captioning steps as the ops call them: inference, in bf16 and fp16."""

from __future__ import annotations

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


@torch.library.custom_op("beit3_fast::cuda_cached_attention", mutates_args=())
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    samples: Tensor | None,
    front: int,
    num_heads: int,
    scale: float,
) -> Tensor:
    """As ``beit3_fast.ops.cached_attention``; ``samples`` int32 [S], None for one of each in order."""
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if o.numel():
        operands = map(cuda_kernels.aligned, (q, k, v))
        seen = seen if seen.stride(2) == 1 else seen.contiguous()
        where = (seen, samples, front, num_heads, scale, o)
        cuda_kernels._launch("decode_attention", *operands, *where)
    return o


@cached_attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


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
        cuda_kernels._launch("head_top_k", cuda_kernels.aligned(x), *tail)
    return log_p, ids


@head_top_k.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, allowed: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    size = (x.shape[0], count)
    return x.new_empty(size, dtype=torch.float32), x.new_empty(size, dtype=torch.int64)
