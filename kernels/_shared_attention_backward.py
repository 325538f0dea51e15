"""The gradients of shared_attention on a GPU: two launches, no atomics, the same bits in every run.

    P = exp2(S log2(e) - lse)    dV = P^T dO    dS = P * (dO V^T - delta)    dQ = scale dS K    dK = scale dS^T Q

The scores are computed again from q, k and the saved log-sum-exp. The first launch owns query tiles: it writes dQ and
delta, the row sums of dO * O; the second owns key tiles and walks over the queries that see them. Places, limits
and letters are those of ``shared_attention.py``. The scores are summed and scaled as they were there: a query that
sees one key has a weight of exactly 1 again. As O is stored, so exact is delta: in 16 bits, where one key has almost all
of a query's weight, what the others get is as inexact as O's rounding makes it (as in FlashAttention, whose method this is).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from beit3_fast.kernels._attention_rows import (
    CAUSAL,
    SEQ2SEQ,
    add_weighted,
    limits,
    load_heads,
    row_of,
    scaled,
    scores_of,
    segment,
    store_heads,
    without_padding,
    zero_heads,
)
from beit3_fast.kernels.shared_attention import _LOG2_E, Segments, Tile, split_width
from torch import Tensor

from beit3_fast.kernels import _tiles
from beit3_fast.kernels import shared_attention as forward


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
    row = row_of(own, vision_q, num_vision_q, text_q)
    place = own
    if positions_ptr is not None:
        place = tl.load(positions_ptr + row) + tl.where(own < num_vision_q, 0, num_vision)
    return row, real, tl.where(real, limits(place, num_vision, num_keys, MASK), 0)


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
    valid_ptr,  # uint8 [Rt] or None
    batch,
    num_heads,
    tiles,  # query tiles of the longest sample
    scale,
    scale_log2e,
    MASK: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    first = program % tiles * BLOCK_Q
    head = program // tiles % num_heads
    sample = program // tiles // num_heads
    vision, num_vision, text, num_text = segment(cu_vision_ptr, cu_text_ptr, sample, batch)
    vision_q, num_vision_q, text_q, num_text_q = segment(
        cu_vision_q_ptr, cu_text_q_ptr, sample, batch
    )
    num_keys, num_queries = num_vision + num_text, num_vision_q + num_text_q
    if first >= num_queries:
        return
    row, real, limit = _query_tile(
        first, positions_ptr, vision_q, num_vision_q, text_q, num_queries, num_vision, num_keys,
        MASK, BLOCK_Q,
    )  # fmt: skip
    if valid_ptr is not None:
        valid_ptr = valid_ptr + (tl.load(cu_text_ptr + sample) - num_vision)

    offset = head * D
    q = load_heads(q_ptr + offset, row, q_stride, D, WIDTH, REST)
    grad = load_heads(grad_ptr + offset, row, grad_stride, D, WIDTH, REST)
    o = load_heads(o_ptr + offset, row, num_heads * D, D, WIDTH, REST)
    delta = tl.sum(grad[0].to(tl.float32) * o[0].to(tl.float32), 1)
    if REST > 0:
        delta += tl.sum(grad[1].to(tl.float32) * o[1].to(tl.float32), 1)
    tl.store(delta_ptr + row * num_heads + head, delta, mask=real)
    lse = tl.load(lse_ptr + row * num_heads + head)

    dq = zero_heads(BLOCK_Q, WIDTH, REST)
    for begin in range(0, tl.max(limit, 0), BLOCK_K):
        place = begin + tl.arange(0, BLOCK_K)
        key_row = row_of(tl.minimum(place, num_keys - 1), vision, num_vision, text)
        k = load_heads(k_ptr + offset, key_row, k_stride, D, WIDTH, REST)
        v = load_heads(v_ptr + offset, key_row, v_stride, D, WIDTH, REST)
        weights = tl.exp2(scores_of(q, k, REST) * scale_log2e - lse[:, None])
        place = without_padding(place, num_vision, num_keys, valid_ptr)
        weights = tl.where(place[None, :] < limit[:, None], weights, 0.0)
        dscores = weights * (scores_of(grad, v, REST) - delta[:, None])
        dq = add_weighted(dq, dscores.to(k_ptr.dtype.element_ty), k, REST)
    dq = scaled(dq, scale, REST)
    store_heads(dq_ptr + offset, row, num_heads * D, real, dq, D, WIDTH, REST)


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
    valid_ptr,  # uint8 [Rt] or None
    batch,
    num_heads,
    tiles,  # key tiles of the longest sample
    scale,
    scale_log2e,
    MASK: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    first_key = program % tiles * BLOCK_K
    head = program // tiles % num_heads
    sample = program // tiles // num_heads
    vision, num_vision, text, num_text = segment(cu_vision_ptr, cu_text_ptr, sample, batch)
    vision_q, num_vision_q, text_q, num_text_q = segment(
        cu_vision_q_ptr, cu_text_q_ptr, sample, batch
    )
    num_keys, num_queries = num_vision + num_text, num_vision_q + num_text_q
    if first_key >= num_keys:
        return
    place = first_key + tl.arange(0, BLOCK_K)
    real_key = place < num_keys
    key_row = row_of(tl.minimum(place, num_keys - 1), vision, num_vision, text)
    if valid_ptr is not None:
        valid_ptr = valid_ptr + (tl.load(cu_text_ptr + sample) - num_vision)
    place = without_padding(place, num_vision, num_keys, valid_ptr)

    offset = head * D
    k = load_heads(k_ptr + offset, key_row, k_stride, D, WIDTH, REST)
    v = load_heads(v_ptr + offset, key_row, v_stride, D, WIDTH, REST)
    dk = zero_heads(BLOCK_K, WIDTH, REST)
    dv = zero_heads(BLOCK_K, WIDTH, REST)
    start = 0
    if positions_ptr is None:
        # Earlier queries see none of these keys.
        if MASK == CAUSAL:
            start = first_key // BLOCK_Q * BLOCK_Q
        elif MASK == SEQ2SEQ:
            start = tl.where(first_key >= num_vision, first_key // BLOCK_Q * BLOCK_Q, 0)
    for first in range(start, num_queries, BLOCK_Q):
        row, _, limit = _query_tile(
            first, positions_ptr, vision_q, num_vision_q, text_q, num_queries, num_vision, num_keys,
            MASK, BLOCK_Q,
        )  # fmt: skip
        q = load_heads(q_ptr + offset, row, q_stride, D, WIDTH, REST)
        grad = load_heads(grad_ptr + offset, row, grad_stride, D, WIDTH, REST)
        lse = tl.load(lse_ptr + row * num_heads + head)
        delta = tl.load(delta_ptr + row * num_heads + head)
        weights = tl.exp2(scores_of(k, q, REST) * scale_log2e - lse[None, :])
        weights = tl.where(place[:, None] < limit[None, :], weights, 0.0)
        dv = add_weighted(dv, weights.to(q_ptr.dtype.element_ty), grad, REST)
        dscores = weights * (scores_of(v, grad, REST) - delta[None, :])
        dk = add_weighted(dk, dscores.to(q_ptr.dtype.element_ty), q, REST)
    dk = scaled(dk, scale, REST)
    store_heads(dk_ptr + offset, key_row, num_heads * D, real_key, dk, D, WIDTH, REST)
    store_heads(dv_ptr + offset, key_row, num_heads * D, real_key, dv, D, WIDTH, REST)


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
        looked_up = queries.positions is not None or keys.valid is not None
        own_class = forward.shape_class(q.dtype, head_dim, None, looked_up=looked_up)
        tile = _tiles.choose(Tile, "shared_attention", own_class, _tiles.architecture(q.device))
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty_like(lse)
    batch = keys.cu_vision.shape[0] - 1
    inputs = (grad, grad.stride(0), q, q.stride(0), k, k.stride(0), v, v.stride(0))
    rows = (keys.cu_vision, keys.cu_text, queries.cu_vision, queries.cu_text, queries.positions)
    rows += (keys.valid,)
    width, rest = split_width(head_dim)
    scales = (scale, scale * _LOG2_E)
    options = {
        "MASK": mask,
        "D": head_dim,
        "WIDTH": width,
        "REST": rest,
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    tiles = triton.cdiv(queries.longest, tile.block_q)
    if tiles:
        query_gradient_kernel[(tiles * num_heads * batch,)](
            *inputs, o, lse, delta, dq, *rows, batch, num_heads, tiles, *scales, **options
        )
    tiles = triton.cdiv(keys.longest, tile.block_k)
    if tiles:
        key_gradient_kernel[(tiles * num_heads * batch,)](
            *inputs, lse, delta, dk, dv, *rows, batch, num_heads, tiles, *scales, **options
        )
    return dq, dk, dv
