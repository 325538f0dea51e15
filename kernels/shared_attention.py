"""shared_attention on a GPU: one softmax over keys that lie in two row ranges, without padding or a mask tensor.

    o = softmax(scale q K^T) V      K, V: the sample's vision rows, then its text rows

A sample's rows are addressed as one sequence: place j is vision row j, or text row j - Nv behind them. With that
every mask structure is one number for each query, its limit: it sees the places in front of it.

    bidirectional: N      causal: p + 1      seq2seq: max(p + 1, Nv)      p: the query's own place

Where a batch is padded, one byte for each text row tells padding from text: no query sees a key that is padding.
Key blocks below the limits of all queries of a tile need no mask; those beyond all limits are not read. Where the
samples are short, such as the 197 tokens of an image, a tile holds whole rows of scores instead: one pass, the maximum
known before the first exponential, nothing rescaled.

Letters: B samples, H heads, D head width, N places of a sample (Nv vision), Rq and R rows of queries and keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from beit3_fast.kernels._attention_rows import (
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
from beit3_fast.kernels._row_statistics import RowStatistics
from torch import Tensor

from beit3_fast.kernels import _tiles

MASKS = ("bidirectional", "seq2seq", "causal")
_LOG2_E = 1.4426950408889634


class Segments(NamedTuple):
    """Where the rows of each sample lie (``TokenLayout``), and the most rows that a sample has."""

    cu_vision: Tensor  # int32 [B + 1], from row 0
    cu_text: Tensor  # int32 [B + 1], counted from the last vision row
    longest: int
    positions: Tensor | None = None  # int32 [R]: place within the sample's vision or text rows
    valid: Tensor | None = (
        None  # uint8 [Rt], as keys: 0 where a text row is padding (None: nowhere)
    )


class Tile(NamedTuple):
    """How a launch is cut: queries of a tile, keys of a step.

    ``whole``: samples of up to so many keys (256 at most; 0: none) take the form that holds whole rows of scores.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    whole: int = 0


@triton.jit
def _attend(
    carry,
    q,
    begin,
    end,
    limit,
    k_ptr,
    k_stride,
    v_ptr,
    v_stride,
    vision,
    num_vision,
    text,
    num_keys,
    valid_ptr,
    scale,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The online softmax over the keys [begin, end); ``scale`` holds log2(e), ``carry`` what was met so far."""
    top, total, acc = carry
    for first in range(begin, end, BLOCK_K):
        place = first + tl.arange(0, BLOCK_K)
        row = row_of(tl.minimum(place, num_keys - 1), vision, num_vision, text)
        k = load_heads(k_ptr, row, k_stride, D, WIDTH, REST)
        scores = scores_of(q, k, REST) * scale
        if MASKED:
            place = without_padding(place, num_vision, num_keys, valid_ptr)
            scores = tl.where(place[None, :] < limit[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A query that has seen no key yet: any finite number instead of inf - inf.
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - pivot[:, None])
        decay = tl.exp2(top - pivot)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        v = load_heads(v_ptr, row, v_stride, D, WIDTH, REST)
        acc = scaled(acc, decay[:, None], REST)
        acc = add_weighted(acc, weights.to(v_ptr.dtype.element_ty), v, REST)
    return top, total, acc


@triton.jit
def _score_pieces(
    pieces,
    rows,
    q,
    limit,
    k_ptr,
    k_stride,
    vision,
    num_vision,
    text,
    num_keys,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Adds the masked scores of SIZE keys, and their rows, if KEYS has this power of two in its sum."""
    if KEYS & SIZE:
        place = KEYS // (2 * SIZE) * (2 * SIZE) + tl.arange(0, SIZE)
        row = row_of(tl.minimum(place, num_keys - 1), vision, num_vision, text)
        k = load_heads(k_ptr, row, k_stride, D, WIDTH, REST)
        scores = scores_of(q, k, REST) * scale
        pieces += (tl.where(place[None, :] < limit[:, None], scores, float("-inf")),)
        rows += (row,)
    return pieces, rows


@triton.jit
def _attend_whole(
    q,
    limit,
    k_ptr,
    k_stride,
    v_ptr,
    v_stride,
    vision,
    num_vision,
    text,
    num_keys,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    KEYS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The softmax over up to KEYS keys at once, their scores in pieces: 224 = 128 + 64 + 32."""
    pieces, rows = (), ()
    for i in tl.static_range(4):
        pieces, rows = _score_pieces(
            pieces, rows, q, limit, k_ptr, k_stride, vision, num_vision, text, num_keys, scale,
            D, WIDTH, REST, KEYS, 256 >> i,
        )  # fmt: skip
    top = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
    for i in tl.static_range(PIECES):
        top = tl.maximum(top, tl.max(pieces[i], 1))
    pivot = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    acc = zero_heads(BLOCK_Q, WIDTH, REST)
    for i in tl.static_range(PIECES):
        weights = tl.exp2(pieces[i] - pivot[:, None])
        total += tl.sum(weights, 1)
        v = load_heads(v_ptr, rows[i], v_stride, D, WIDTH, REST)
        acc = add_weighted(acc, weights.to(v_ptr.dtype.element_ty), v, REST)
    return top, total, acc


@triton.jit
def shared_attention_kernel(
    q_ptr,  # [Rq, H * D]
    q_stride,
    k_ptr,  # [R, H * D]
    k_stride,
    v_ptr,  # [R, H * D]
    v_stride,
    o_ptr,  # [Rq, H * D], contiguous
    lse_ptr,  # fp32 [Rq, H] or None: log2 of the sum of exp(scores)
    parts_ptr,  # fp32 [Rq, H, 2] or None: RowStatistics of o
    cu_vision_ptr,  # int32 [B + 1]
    cu_text_ptr,
    cu_vision_q_ptr,
    cu_text_q_ptr,
    positions_ptr,  # int32 [Rq] or None: all rows are queries
    valid_ptr,  # uint8 [Rt] or None: no row is padding
    batch,
    num_heads,
    tiles,  # query tiles of the longest sample
    scale,  # times log2(e)
    MASK: tl.constexpr,
    D: tl.constexpr,  # known to the compiler, which then knows the alignment of every head
    WIDTH: tl.constexpr,  # WIDTH + REST hold D: 64 + 32 for 88, where one power of two would be 128
    REST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEYS: tl.constexpr,  # whole rows of scores: at least the keys of every sample; 0: steps of BLOCK_K
    PIECES: tl.constexpr,  # powers of two whose sum KEYS is
):
    # Tiles of one head of one sample run side by side, so that its keys stay in the L2 cache.
    program = tl.program_id(0)
    tile = program % tiles
    head = program // tiles % num_heads
    sample = program // tiles // num_heads
    vision, num_vision, text, num_text = segment(cu_vision_ptr, cu_text_ptr, sample, batch)
    vision_q, num_vision_q, text_q, num_text_q = segment(
        cu_vision_q_ptr, cu_text_q_ptr, sample, batch
    )
    num_keys, num_queries = num_vision + num_text, num_vision_q + num_text_q
    if tile * BLOCK_Q >= num_queries:
        return

    # Queries past the end repeat the last one and are not stored.
    own = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = own < num_queries
    own = tl.minimum(own, num_queries - 1)
    row = row_of(own, vision_q, num_vision_q, text_q)
    place = own
    if positions_ptr is not None:
        place = tl.load(positions_ptr + row) + tl.where(own < num_vision_q, 0, num_vision)
    limit = limits(place, num_vision, num_keys, MASK)
    if valid_ptr is not None:
        valid_ptr = valid_ptr + (tl.load(cu_text_ptr + sample) - num_vision)

    offset = head * D
    q = load_heads(q_ptr + offset, row, q_stride, D, WIDTH, REST)
    if KEYS > 0:
        top, total, acc = _attend_whole(
            q, limit, k_ptr + offset, k_stride, v_ptr + offset, v_stride, vision, num_vision, text,
            num_keys, scale, D, WIDTH, REST, BLOCK_Q, KEYS, PIECES,
        )  # fmt: skip
    else:
        carry = (
            tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32),
            tl.zeros((BLOCK_Q,), dtype=tl.float32),
            zero_heads(BLOCK_Q, WIDTH, REST),
        )
        seen_by_all = tl.min(limit, 0)
        if valid_ptr is not None:
            seen_by_all = tl.minimum(seen_by_all, num_vision)
        seen_by_all = seen_by_all // BLOCK_K * BLOCK_K
        seen = tl.max(limit, 0)
        carry = _attend(
            carry, q, 0, seen_by_all, limit, k_ptr + offset, k_stride, v_ptr + offset, v_stride,
            vision, num_vision, text, num_keys, valid_ptr, scale, False, D, WIDTH, REST, BLOCK_K,
        )  # fmt: skip
        carry = _attend(
            carry, q, seen_by_all, seen, limit, k_ptr + offset, k_stride, v_ptr + offset, v_stride,
            vision, num_vision, text, num_keys, valid_ptr, scale, True, D, WIDTH, REST, BLOCK_K,
        )  # fmt: skip
        top, total, acc = carry

    # A query that sees no key gives zeros. A NaN stays one.
    acc = scaled(acc, (1.0 / tl.where(total == 0.0, 1.0, total))[:, None], REST)
    store_heads(o_ptr + offset, row, num_heads * D, real, acc, D, WIDTH, REST)
    if lse_ptr is not None:
        tl.store(lse_ptr + row * num_heads + head, top + tl.log2(total), mask=real)
    if parts_ptr is not None:
        # Of what was stored. Columns past D are zero: they add nothing to the mean, and are left out of the squares.
        o = acc[0].to(o_ptr.dtype.element_ty).to(tl.float32)
        mean = tl.sum(o, 1) / D
        if REST > 0:
            rest = acc[1].to(o_ptr.dtype.element_ty).to(tl.float32)
            mean += tl.sum(rest, 1) / D
        shift = tl.where((tl.arange(0, WIDTH) < D)[None, :], o - mean[:, None], 0.0)
        squares = tl.sum(shift * shift, 1)
        if REST > 0:
            real_rest = WIDTH + tl.arange(0, REST) < D
            shift = tl.where(real_rest[None, :], rest - mean[:, None], 0.0)
            squares += tl.sum(shift * shift, 1)
        at = parts_ptr + (row * num_heads + head) * 2
        tl.store(at, mean, mask=real)
        tl.store(at + 1, squares, mask=real)


class Attention(NamedTuple):
    """What the kernel leaves behind."""

    o: Tensor  # [Rq, H * D]
    lse: (
        Tensor | None
    )  # fp32 [Rq, H]: the log-sum-exp of the scores to the base 2, as the backward pass reads it
    statistics: RowStatistics | None


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Segments,
    queries: Segments,
    num_heads: int,
    scale: float,
    mask: str,
    *,
    with_lse: bool = False,
    with_statistics: bool = False,
    tile: Tile | None = None,
) -> Attention:
    """q [Rq, H * D], k and v [R, H * D] (fp32, fp16, bf16; elements of a row side by side). Arguments are trusted.

    ``queries`` is ``keys``, or the segments of a selection of its rows, with positions. With ``with_lse`` a query
    that sees no key has -inf.
    """
    head_dim = q.shape[1] // num_heads
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = parts = None
    if with_lse:
        lse = torch.empty(q.shape[0], num_heads, dtype=torch.float32, device=q.device)
    if with_statistics:
        parts = torch.empty(q.shape[0], num_heads, 2, dtype=torch.float32, device=q.device)
    if tile is None:
        padded = keys.valid is not None
        own_class = shape_class(q.dtype, head_dim, keys.longest, looked_up=padded)
        tile = _tiles.choose(Tile, "shared_attention", own_class, _tiles.architecture(q.device))
    batch = keys.cu_vision.shape[0] - 1
    tiles = triton.cdiv(queries.longest, tile.block_q)
    width, rest = split_width(head_dim)
    takes_whole = keys.valid is None and keys.longest <= tile.whole
    whole = triton.cdiv(keys.longest, 32) * 32 if takes_whole else 0
    if batch and tiles:
        shared_attention_kernel[(tiles * num_heads * batch,)](
            q,
            q.stride(0),
            k,
            k.stride(0),
            v,
            v.stride(0),
            o,
            lse,
            parts,
            keys.cu_vision,
            keys.cu_text,
            queries.cu_vision,
            queries.cu_text,
            queries.positions,
            keys.valid,
            batch,
            num_heads,
            tiles,
            scale * _LOG2_E,
            MASK=mask,
            D=head_dim,
            WIDTH=width,
            REST=rest,
            BLOCK_Q=tile.block_q,
            BLOCK_K=tile.block_k,
            KEYS=whole,
            PIECES=whole.bit_count(),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return Attention(o, lse, None if parts is None else RowStatistics(parts, head_dim))


def split_width(head_dim: int) -> tuple[int, int]:
    """The head's width as one power of two of 16 or more, or as two where that pads less: 88 -> (64, 32)."""
    whole = max(16, triton.next_power_of_2(head_dim))
    if whole > 16:
        rest = max(16, triton.next_power_of_2(head_dim - whole // 2))
        if whole // 2 + rest < whole:
            return whole // 2, rest
    return whole, 0


def shape_class(
    dtype: torch.dtype, head_dim: int, longest: int | None, *, looked_up: bool = False
) -> str:
    """The class of ``tiles/*.json`` for samples of up to ``longest`` keys, or (None) for the gradients.

    Heads of more than 64 hold two parts of each sum in registers: the tiles of narrow ones spill with them, and those
    of their gradients where something is ``looked_up`` for each row: places of selected queries, or what is padding.
    Whole rows of scores leave no registers to look up padding: padded batches go step by step.
    """
    words = ["wide"] * (head_dim > 64) + ["fp32"] * (dtype == torch.float32)
    if longest is None:
        words += ["selected"] * (looked_up and words == ["wide"]) + ["backward"]
    elif dtype != torch.float32:
        words.append("short" if longest <= 256 and not looked_up else "long")
    return " ".join(words)
