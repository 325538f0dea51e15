"""What every attention kernel is made of: where the rows of a sample lie, how many keys a query sees, and its heads.

A head's width is held as one power of two (WIDTH), or as two (WIDTH + REST): 64 + 32 for 88, where one would be 128.
So heads are pairs of tensors; the second is anything where REST is 0. Letters as in ``shared_attention.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

CAUSAL = tl.constexpr("causal")
SEQ2SEQ = tl.constexpr("seq2seq")
_BEYOND = tl.constexpr(1 << 30)


@triton.jit
def segment(cu_vision_ptr, cu_text_ptr, sample, batch):
    """First vision row, vision rows, first text row, text rows of a sample."""
    vision = tl.load(cu_vision_ptr + sample)
    num_vision = tl.load(cu_vision_ptr + sample + 1) - vision
    text = tl.load(cu_text_ptr + sample)
    num_text = tl.load(cu_text_ptr + sample + 1) - text
    return vision, num_vision, text + tl.load(cu_vision_ptr + batch), num_text


@triton.jit
def row_of(place, vision, num_vision, text):
    row = tl.where(place < num_vision, vision + place, text + place - num_vision)
    return row.to(tl.int64)


@triton.jit
def limits(place, num_vision, num_keys, MASK: tl.constexpr):
    """How many keys, in the order vision, text, the queries at these places see."""
    if MASK == CAUSAL:
        limit = place + 1
    elif MASK == SEQ2SEQ:
        limit = tl.maximum(place + 1, num_vision)
    else:
        limit = tl.zeros_like(place) + num_keys
    return limit


@triton.jit
def without_padding(place, num_vision, num_keys, valid_ptr):
    """The places of keys, those of padding moved beyond every limit. ``valid_ptr`` is indexed by the places of text."""
    if valid_ptr is not None:
        text = (place >= num_vision) & (place < num_keys)
        valid = tl.load(valid_ptr + place, mask=text, other=1)
        place = tl.where(valid != 0, place, _BEYOND)
    return place


@triton.jit
def load_rows(ptr, row, stride, column, D: tl.constexpr):
    """[rows, columns], zero past the head's width D."""
    at = ptr + row[:, None] * stride + column[None, :]
    return tl.load(at, mask=(column < D)[None, :], other=0.0)


@triton.jit
def load_heads(ptr, row, stride, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    """One head of some rows, as columns [rows, WIDTH] and the rest [rows, REST] (or anything, for REST = 0)."""
    part = load_rows(ptr, row, stride, tl.arange(0, WIDTH), D)
    rest = part
    if REST > 0:
        rest = load_rows(ptr, row, stride, WIDTH + tl.arange(0, REST), D)
    return part, rest


@triton.jit
def store_heads(
    ptr, row, stride, real, heads, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr
):
    column = tl.arange(0, WIDTH)
    at = ptr + row[:, None] * stride
    part = heads[0].to(ptr.dtype.element_ty)
    tl.store(at + column[None, :], part, mask=real[:, None] & (column < D)[None, :])
    if REST > 0:
        beyond = WIDTH + tl.arange(0, REST)
        rest = heads[1].to(ptr.dtype.element_ty)
        tl.store(at + beyond[None, :], rest, mask=real[:, None] & (beyond < D)[None, :])


@triton.jit
def zero_heads(ROWS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    part = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    rest = part
    if REST > 0:
        rest = tl.zeros((ROWS, REST), dtype=tl.float32)
    return part, rest


@triton.jit
def scores_of(a, b, REST: tl.constexpr):
    """a b^T over the head's width, fp32."""
    scores = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if REST > 0:
        scores = tl.dot(a[1], tl.trans(b[1]), scores, input_precision="ieee")
    return scores


@triton.jit
def add_weighted(acc, weights, b, REST: tl.constexpr):
    """acc + weights b."""
    part = tl.dot(weights, b[0], acc[0], input_precision="ieee")
    rest = acc[1]
    if REST > 0:
        rest = tl.dot(weights, b[1], acc[1], input_precision="ieee")
    return part, rest


@triton.jit
def scaled(heads, factor, REST: tl.constexpr):
    part = heads[0] * factor
    rest = heads[1]
    if REST > 0:
        rest = heads[1] * factor
    return part, rest
