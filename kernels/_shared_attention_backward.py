"""The gradients of shared_attention on a GPU: two launches, no atomics, the same bits in every run.

    P = exp(S - lse)    dV = P^T dO    dS = P * (dO V^T - delta)    dQ = scale dS K    dK = scale dS^T Q

The scores are computed again from q, k and the saved log-sum-exp. The first launch owns query tiles: it writes dQ and
delta, the row sums of dO * O; the second owns key tiles and walks over the queries that see them. Places, limits
and letters are those of ``shared_attention.py``; the head's width is padded to one power of two here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from beit3_fast.kernels.shared_attention import (
    _CAUSAL,
    _LOG2_E,
    _SEQ2SEQ,
    Segments,
    Tile,
    _limits,
    _load_rows,
    _row_of,
    _segment,
)
from torch import Tensor

from beit3_fast.kernels import _tiles
from beit3_fast.kernels import shared_attention as forward

_PER_LN = tl.constexpr(_LOG2_E)


@triton.jit
def _query_tile(
    first,
    positions_ptr,
    vision_q,
    num_vision_q,
    text_q,
    num_queries,
    num_vision,
    num_keys,
    MASK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Rows of a tile of queries, which of them are real, and how many keys each sees: none past the end."""
    own = first + tl.arange(0, BLOCK_Q)
    real = own < num_queries
    own = tl.minimum(own, num_queries - 1)
    row = _row_of(own, vision_q, num_vision_q, text_q)
    place = own
    if positions_ptr is not None:
        place = tl.load(positions_ptr + row) + tl.where(own < num_vision_q, 0, num_vision)
    return row, real, tl.where(real, _limits(place, num_vision, num_keys, MASK), 0)


@triton.jit
def query_gradient_kernel(
    grad_ptr,  # [Rq, H * D]
    grad_stride,
    q_ptr,  # [Rq, H * D]
    q_stride,
    k_ptr,  # [R, H * D]
    k_stride,
    v_ptr,  # [R, H * D]
    v_stride,
    o_ptr,  # [Rq, H * D], contiguous
    lse_ptr,  # fp32 [Rq, H]
    delta_ptr,  # fp32 [Rq, H], written
    dq_ptr,  # [Rq, H * D], contiguous, written
    cu_vision_ptr,  # int32 [B + 1]
    cu_text_ptr,
    cu_vision_q_ptr,
    cu_text_q_ptr,
    positions_ptr,  # int32 [Rq] or None
    batch,
    num_heads,
    tiles,  # query tiles of the longest sample
    scale,
    MASK: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    first = program % tiles * BLOCK_Q
    head = program // tiles % num_heads
    sample = program // tiles // num_heads
    vision, num_vision, text, num_text = _segment(cu_vision_ptr, cu_text_ptr, sample, batch)
    vision_q, num_vision_q, text_q, num_text_q = _segment(
        cu_vision_q_ptr, cu_text_q_ptr, sample, batch
    )
    num_keys, num_queries = num_vision + num_text, num_vision_q + num_text_q
    if first >= num_queries:
        return
    row, real, limit = _query_tile(
        first, positions_ptr, vision_q, num_vision_q, text_q, num_queries, num_vision, num_keys,
        MASK, BLOCK_Q,
    )  # fmt: skip

    offset = head * D
    column = tl.arange(0, WIDTH)
    q = _load_rows(q_ptr + offset, row, q_stride, column, D)
    grad = _load_rows(grad_ptr + offset, row, grad_stride, column, D)
    o = _load_rows(o_ptr + offset, row, num_heads * D, column, D)
    delta = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + row * num_heads + head, delta, mask=real)
    lse = tl.load(lse_ptr + row * num_heads + head) * _PER_LN

    dq = tl.zeros((BLOCK_Q, WIDTH), dtype=tl.float32)
    for begin in range(0, tl.max(limit, 0), BLOCK_K):
        place = begin + tl.arange(0, BLOCK_K)
        key_row = _row_of(tl.minimum(place, num_keys - 1), vision, num_vision, text)
        k = _load_rows(k_ptr + offset, key_row, k_stride, column, D)
        v = _load_rows(v_ptr + offset, key_row, v_stride, column, D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _PER_LN)
        weights = tl.exp2(scores - lse[:, None])
        weights = tl.where(place[None, :] < limit[:, None], weights, 0.0)
        dweights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    at = dq_ptr + row[:, None] * (num_heads * D) + offset + column[None, :]
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(at, dq, mask=real[:, None] & (column < D)[None, :])


@triton.jit
def key_gradient_kernel(
    grad_ptr,  # [Rq, H * D]
    grad_stride,
    q_ptr,  # [Rq, H * D]
    q_stride,
    k_ptr,  # [R, H * D]
    k_stride,
    v_ptr,  # [R, H * D]
    v_stride,
    lse_ptr,  # fp32 [Rq, H]
    delta_ptr,  # fp32 [Rq, H]
    dk_ptr,  # [R, H * D], contiguous, written
    dv_ptr,  # [R, H * D], contiguous, written
    cu_vision_ptr,  # int32 [B + 1]
    cu_text_ptr,
    cu_vision_q_ptr,
    cu_text_q_ptr,
    positions_ptr,  # int32 [Rq] or None
    batch,
    num_heads,
    tiles,  # key tiles of the longest sample
    scale,
    MASK: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    first_key = program % tiles * BLOCK_K
    head = program // tiles % num_heads
    sample = program // tiles // num_heads
    vision, num_vision, text, num_text = _segment(cu_vision_ptr, cu_text_ptr, sample, batch)
    vision_q, num_vision_q, text_q, num_text_q = _segment(
        cu_vision_q_ptr, cu_text_q_ptr, sample, batch
    )
    num_keys, num_queries = num_vision + num_text, num_vision_q + num_text_q
    if first_key >= num_keys:
        return
    place = first_key + tl.arange(0, BLOCK_K)
    real_key = place < num_keys
    key_row = _row_of(tl.minimum(place, num_keys - 1), vision, num_vision, text)

    offset = head * D
    column = tl.arange(0, WIDTH)
    k = _load_rows(k_ptr + offset, key_row, k_stride, column, D)
    v = _load_rows(v_ptr + offset, key_row, v_stride, column, D)
    dk = tl.zeros((BLOCK_K, WIDTH), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, WIDTH), dtype=tl.float32)
    start = 0
    if positions_ptr is None:
        # Earlier queries see none of these keys.
        if MASK == _CAUSAL:
            start = first_key // BLOCK_Q * BLOCK_Q
        elif MASK == _SEQ2SEQ:
            start = tl.where(first_key >= num_vision, first_key // BLOCK_Q * BLOCK_Q, 0)
    for first in range(start, num_queries, BLOCK_Q):
        row, _, limit = _query_tile(
            first, positions_ptr, vision_q, num_vision_q, text_q, num_queries, num_vision, num_keys,
            MASK, BLOCK_Q,
        )  # fmt: skip
        q = _load_rows(q_ptr + offset, row, q_stride, column, D)
        grad = _load_rows(grad_ptr + offset, row, grad_stride, column, D)
        lse = tl.load(lse_ptr + row * num_heads + head) * _PER_LN
        delta = tl.load(delta_ptr + row * num_heads + head)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * _PER_LN)
        weights = tl.exp2(scores - lse[None, :])
        weights = tl.where(place[:, None] < limit[None, :], weights, 0.0)
        dv = tl.dot(weights.to(q.dtype), grad, dv, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(grad), input_precision="ieee")
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    at = key_row[:, None] * (num_heads * D) + offset + column[None, :]
    real = real_key[:, None] & (column < D)[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=real)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=real)


def shared_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    keys: Segments,
    queries: Segments,
    num_heads: int,
    scale: float,
    mask: str,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [Rq, C], k and v [R, C], given that of o [Rq, C], and o and lse of ``shared_attention``."""
    head_dim = q.shape[1] // num_heads
    if tile is None:
        own_class = forward.shape_class(q.dtype, 0)
        own_class = "fp32 backward" if own_class == "fp32" else "backward"
        tile = _tiles.choose(Tile, "shared_attention", own_class, _tiles.architecture(q.device))
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty_like(lse)
    batch = keys.cu_vision.shape[0] - 1
    inputs = (grad, grad.stride(0), q, q.stride(0), k, k.stride(0), v, v.stride(0))
    rows = (keys.cu_vision, keys.cu_text, queries.cu_vision, queries.cu_text, queries.positions)
    options = {
        "MASK": mask,
        "D": head_dim,
        "WIDTH": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    tiles = triton.cdiv(queries.longest, tile.block_q)
    if tiles:
        query_gradient_kernel[(tiles * num_heads * batch,)](
            *inputs, o, lse, delta, dq, *rows, batch, num_heads, tiles, scale, **options
        )
    tiles = triton.cdiv(keys.longest, tile.block_k)
    if tiles:
        key_gradient_kernel[(tiles * num_heads * batch,)](
            *inputs, lse, delta, dk, dv, *rows, batch, num_heads, tiles, scale, **options
        )
    return dq, dk, dv
