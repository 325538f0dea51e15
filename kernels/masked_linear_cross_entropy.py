"""masked_linear_cross_entropy on a GPU: the log-sum-exp of logits that are in registers only, and their slopes.

    z = x[rows] W^T + b      top = max_v z_v      total = sum_v exp(z_v - top)      L = top + log total
    loss = (1 - s) (L - z_target) + s mean_v (L - z_v)
    slope_v = dloss (exp(z_v - top) / total - (1 - s) [v = target] - s / V)

The rows are few and the vocabulary is long. ``loss_kernel`` owns a tile of rows and a part of the vocabulary, goes
through its tiles and leaves four numbers a row: top, total, the target's logit, the sum of all. ``slope_kernel`` is one
tile of the backward pass: it computes the logits again by the same steps of the same tiles, with the same bits, and
stores what two ordinary products turn into gradients: slopes of a slice of the vocabulary, in the operands' dtype.

Letters: M named rows, D features, V classes, P parts of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from beit3_fast.kernels.expert_linear import _multiprocessors
from torch import Tensor

from beit3_fast.kernels import _tiles

_LOWEST = tl.constexpr(-3.4028234663852886e38)


class Tile(NamedTuple):
    """How a launch is cut: rows and classes of a tile, and its step along the features."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def _named(rows_ptr, targets_ptr, tile, M, BLOCK_M: tl.constexpr):
    """Places of a tile, which of them are real, their rows (past the end the last one again) and targets."""
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = place < M
    place = tl.minimum(place, M - 1).to(tl.int64)
    return place, real, tl.load(rows_ptr + place), tl.load(targets_ptr + place)


@triton.jit
def _logits(
    x_ptr,
    x_stride,
    row,
    weight_ptr,
    weight_stride,
    bias_ptr,
    column,
    V,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z [rows, columns], fp32; columns past the vocabulary repeat the last one."""
    depth = tl.arange(0, BLOCK_K)
    weight_row = tl.minimum(column, V - 1).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        x_at = x_ptr + row[:, None] * x_stride + (k + depth)[None, :]
        x = tl.load(x_at, mask=depth[None, :] < D - k, other=0.0)
        weight_at = weight_ptr + weight_row[None, :] * weight_stride + (k + depth)[:, None]
        w = tl.load(weight_at, mask=depth[:, None] < D - k, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + weight_row).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "tiles_m", "part_width"])
def loss_kernel(
    x_ptr,  # [R, D]
    x_stride,
    weight_ptr,  # [V, D]
    weight_stride,
    bias_ptr,  # [V] or None
    rows_ptr,  # int64 [M]
    targets_ptr,  # int64 [M]
    parts_ptr,  # fp32 [P, M, 4], written: top, total, the target's logit or 0, sum of the logits
    M,
    tiles_m,
    part_width,  # classes of a part, a multiple of BLOCK_N
    V,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # All row tiles of a part run side by side, so that its weights are read once.
    part = tl.program_id(0) // tiles_m
    place, real, row, target = _named(rows_ptr, targets_ptr, tl.program_id(0) % tiles_m, M, BLOCK_M)
    top = tl.full((BLOCK_M,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    hit = tl.zeros((BLOCK_M,), dtype=tl.float32)
    everything = tl.zeros((BLOCK_M,), dtype=tl.float32)
    begin = part * part_width
    for first in range(begin, tl.minimum(begin + part_width, V), BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        z = _logits(
            x_ptr, x_stride, row, weight_ptr, weight_stride, bias_ptr, column, V, D,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        hit += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
        everything += tl.sum(tl.where((column < V)[None, :], z, 0.0), 1)
        z = tl.where((column < V)[None, :], z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), 1)
        top = new_top
    at = parts_ptr + (part.to(tl.int64) * M + place) * 4
    tl.store(at, top, mask=real)
    tl.store(at + 1, total, mask=real)
    tl.store(at + 2, hit, mask=real)
    tl.store(at + 3, everything, mask=real)


@triton.jit(do_not_specialize=["M", "tiles_m", "first", "end", "smoothing"])
def slope_kernel(
    x_ptr,  # [R, D]
    x_stride,
    weight_ptr,  # [V, D]
    weight_stride,
    bias_ptr,  # [V] or None
    rows_ptr,  # int64 [M]
    targets_ptr,  # int64 [M]
    grad_ptr,  # fp32 [M]
    peaks_ptr,  # fp32 [M, 2]: top, total
    slope_ptr,  # [M, end - first], written
    sums_ptr,  # fp32 [row tiles, end - first] or None: column sums of the slopes, written
    M,
    tiles_m,
    first,  # classes of the slice: [first, end)
    end,
    smoothing,
    V,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0) % tiles_m
    place, real, row, target = _named(rows_ptr, targets_ptr, tile, M, BLOCK_M)
    column = first + tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    z = _logits(
        x_ptr, x_stride, row, weight_ptr, weight_stride, bias_ptr, column, V, D,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    top, total = tl.load(peaks_ptr + 2 * place), tl.load(peaks_ptr + 2 * place + 1)
    grad = tl.where(real, tl.load(grad_ptr + place), 0.0)
    slope = tl.exp(z - top[:, None]) / total[:, None] - smoothing / V
    slope -= tl.where(column[None, :] == target[:, None], 1.0 - smoothing, 0.0)
    slope *= grad[:, None]
    width = end - first
    at = slope_ptr + place[:, None] * width + (column - first)[None, :]
    inside = real[:, None] & (column < end)[None, :]
    tl.store(at, slope.to(slope_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        tl.store(sums_ptr + tile * width + column - first, tl.sum(slope, 0), mask=column < end)


def losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    label_smoothing: float,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses fp32 [M] and peaks fp32 [M, 2], as ``beit3_fast.composite.masked_linear_cross_entropy`` gives them.

    x [R, D], weight [V, D], bias [V] (fp32, fp16, bf16; elements of a row side by side). Arguments are trusted.
    """
    count, (vocabulary, features) = len(rows), weight.shape
    tile = _tile_of(x) if tile is None else tile
    tiles_m = triton.cdiv(count, tile.block_m)
    # Parts enough that every multiprocessor has a program; each has whole tiles.
    wanted = triton.cdiv(2 * _multiprocessors(x.device), max(1, tiles_m))
    part_width = triton.cdiv(triton.cdiv(vocabulary, wanted), tile.block_n) * tile.block_n
    num_parts = triton.cdiv(vocabulary, part_width)
    parts = torch.empty(num_parts, count, 4, dtype=torch.float32, device=x.device)
    if count:
        loss_kernel[(tiles_m * num_parts,)](
            x,
            x.stride(0),
            weight,
            weight.stride(0),
            bias,
            rows,
            targets,
            parts,
            count,
            tiles_m,
            part_width,
            vocabulary,
            features,
            **_options(tile),
        )
    tops, totals, hits, sums = parts.unbind(2)
    top = tops.amax(0)
    total = (totals * (tops - top).exp()).sum(0)
    hit = hits.sum(0)
    found = total.log() + (top - hit)
    if label_smoothing:
        found += label_smoothing * (hit - sums.sum(0) / vocabulary)
    return found, torch.stack([top, total], dim=1)


def slopes(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    peaks: Tensor,
    label_smoothing: float,
    own: slice,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Slopes [M, v] of the logits of a slice of the vocabulary in x's dtype, and with a bias their sums fp32 [v].

    ``grad`` fp32 [M], contiguous: the gradient of the losses. In fp16 it must be scaled: slopes below 6e-5 lose
    digits, those below 3e-8 are zero.
    """
    count, width = len(rows), own.stop - own.start
    tile = _tile_of(x) if tile is None else tile
    tiles_m = triton.cdiv(count, tile.block_m)
    slope, parts = x.new_empty(count, width), None
    if bias is not None:
        parts = torch.empty(tiles_m, width, dtype=torch.float32, device=x.device)
    if count:
        slope_kernel[(tiles_m * triton.cdiv(width, tile.block_n),)](
            x,
            x.stride(0),
            weight,
            weight.stride(0),
            bias,
            rows,
            targets,
            grad,
            peaks,
            slope,
            parts,
            count,
            tiles_m,
            own.start,
            own.stop,
            label_smoothing,
            *weight.shape,
            **_options(tile),
        )
    return slope, None if parts is None else parts.sum(0)


def _tile_of(x: Tensor) -> Tile:
    own_class = "fp32" if x.dtype == torch.float32 else "16 bits"
    name = _tiles.architecture(x.device)
    return _tiles.choose(Tile, "masked_linear_cross_entropy", own_class, name)


def _options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
