"""Moments of rows: what a LayerNorm needs of the rows that another op wrote."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class RowStatistics(NamedTuple):
    """Mean and sum of squared deviations of every row, in parts of ``width`` columns (the last may have fewer)."""

    parts: Tensor  # fp32 [M, T, 2]
    width: int


# More of them beside a tile of sums do not fit into registers: they are joined in front of the product.
MOST_PARTS = 16


@triton.jit
def moments(parts_ptr, rows, num_parts, width, K, eps, PARTS: tl.constexpr):
    """Mean and reciprocal deviation of rows, from the moments of their parts."""
    mean, squares = _joined(parts_ptr, rows, num_parts, width, K, PARTS)
    return mean, 1.0 / tl.sqrt_rn(squares / K + eps)


@triton.jit
def _joined(parts_ptr, rows, num_parts, width, K, PARTS: tl.constexpr):
    """Mean and sum of squared deviations of rows, from those of their parts (Chan's combination)."""
    part = tl.arange(0, PARTS)
    real = part < num_parts
    count = tl.where(real, tl.minimum(K - part * width, width), 0).to(tl.float32)
    at = parts_ptr + (rows[:, None] * num_parts + part[None, :]) * 2
    means = tl.load(at, mask=real[None, :], other=0.0)
    squares = tl.load(at + 1, mask=real[None, :], other=0.0)
    mean = tl.sum(means * (count / K)[None, :], 1)
    shift = means - mean[:, None]
    return mean, tl.sum(squares + shift * shift * count[None, :], 1)


@triton.jit(do_not_specialize=["num_rows"])
def join_kernel(
    parts_ptr,  # fp32 [M, T, 2]
    joined_ptr,  # fp32 [M, 1, 2]
    num_rows,  # M
    num_parts,  # T
    width,
    K,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two that holds T
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    real = row < num_rows
    row = tl.minimum(row, num_rows - 1)
    mean, squares = _joined(parts_ptr, row, num_parts, width, K, PARTS)
    tl.store(joined_ptr + row * 2, mean, mask=real)
    tl.store(joined_ptr + row * 2 + 1, squares, mask=real)


def joined(statistics: RowStatistics, features: int) -> RowStatistics:
    """The statistics of rows of ``features`` columns in one part each where they have more than MOST_PARTS."""
    count, num_parts, _ = statistics.parts.shape
    if num_parts <= MOST_PARTS:
        return statistics
    whole = statistics.parts.new_empty(count, 1, 2)
    parts = triton.next_power_of_2(num_parts)
    block_r = max(1, 2048 // parts)
    if count:
        join_kernel[(triton.cdiv(count, block_r),)](
            statistics.parts,
            whole,
            count,
            num_parts,
            statistics.width,
            features,
            BLOCK_R=block_r,
            PARTS=parts,
        )
    return RowStatistics(whole, features)


@triton.jit(do_not_specialize=["num_rows"])
def row_statistics_kernel(
    x_ptr,  # [M, K]
    x_stride,
    rows_ptr,  # int64 [R] or None
    parts_ptr,  # fp32 [M, 1, 2]
    num_rows,  # R
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
):
    place = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.minimum(place, num_rows - 1).to(tl.int64)
    if rows_ptr is not None:
        row = tl.load(rows_ptr + row)
    column = tl.arange(0, BLOCK_K)
    real = (column < K)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=real, other=0.0)
    mean = tl.sum(x.to(tl.float32), 1) / K
    shift = tl.where(real, x.to(tl.float32) - mean[:, None], 0.0)
    tl.store(parts_ptr + row * 2, mean, mask=place < num_rows)
    tl.store(parts_ptr + row * 2 + 1, tl.sum(shift * shift, 1), mask=place < num_rows)


def row_statistics(x: Tensor, rows: Tensor | None = None) -> RowStatistics:
    """The statistics of the rows [M, K], or of those that ``rows`` int64 [R] names, in one part each."""
    count = x.shape[0] if rows is None else rows.shape[0]
    features = x.shape[1]
    parts = torch.empty(x.shape[0], 1, 2, dtype=torch.float32, device=x.device)
    block_k = triton.next_power_of_2(features)
    block_r = max(1, 4096 // block_k)
    if count:
        row_statistics_kernel[(triton.cdiv(count, block_r),)](
            x, x.stride(0), rows, parts, count, features, BLOCK_R=block_r, BLOCK_K=block_k
        )
    return RowStatistics(parts, features)
