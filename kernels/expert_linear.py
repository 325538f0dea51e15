"""expert_linear on a GPU: one persistent launch in which rows of expert e meet the weights of expert e.

    y[r] = gelu(rstd (x[r] W'_e^T - mean s_e) + c_e) + residual[r]
    W' = W diag(gamma), rounded;  s = row sums of the rounded W';  c = W beta + b

LayerNorm costs no pass over the activations: gamma and beta are folded into the weights, and mean and rstd of a row
enter behind the product, from two numbers for each part of the row (``RowStatistics``) that the op which wrote the
row left behind. Normalising in the main loop instead would take the operand from shared memory through registers
for every column tile. Only fp32 subtracts the mean in front of the product: there the difference of two large
sums would show, and no tensor core waits. The sums ``s`` must be those of the *rounded* weights: with others, a row
whose mean is 50 deviations loses 1.5 of its 2.5 digits in bf16.

Letters: M rows of the tensors, R rows of the experts, K input features, N output features, E experts, T parts of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from beit3_fast.kernels._folded_weights import FoldedWeights
from beit3_fast.kernels._row_statistics import RowStatistics, joined, moments, row_statistics
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from beit3_fast.kernels import _tiles

MAX_EXPERTS = 3
_SQRT_HALF = tl.constexpr(0.7071067811865476)


class Tile(NamedTuple):
    """How a launch is cut: a tile of the result, its step along K, and the row tiles that share columns in a turn.

    ``slices`` (1, 2 or 4): column slices of a tile that are finished one after the other; in the files they are as wide
    as the parts of the statistics. ``tma``: loads by the
    tensor memory accelerator (sm_90 and newer) where rows are contiguous and begin at multiples of 16 bytes.
    ``per_sm``: programs that share a multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    slices: int = 1
    tma: bool = False
    per_sm: int = 1


@triton.jit
def _locate(tile, tiles_n, start, end0, end1, end2, BLOCK_M, GROUP_M: tl.constexpr):
    """Expert of a tile, its first row, the end of the expert's rows, and its first column tile.

    Tiles count through the experts one after the other, so all columns of a few row tiles are met while their rows
    are in the L2 cache.
    """
    tiles0 = tl.cdiv(end0 - start, BLOCK_M) * tiles_n
    tiles01 = tiles0 + tl.cdiv(end1 - end0, BLOCK_M) * tiles_n
    expert = (tile >= tiles0).to(tl.int32) + (tile >= tiles01).to(tl.int32)
    begin = tl.where(expert == 0, start, tl.where(expert == 1, end0, end1))
    end = tl.where(expert == 0, end0, tl.where(expert == 1, end1, end2))
    own = tile - tl.where(expert == 0, 0, tl.where(expert == 1, tiles0, tiles01))
    group = own // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tl.cdiv(end - begin, BLOCK_M) - first, GROUP_M)
    place = own - group * GROUP_M * tiles_n
    return expert, begin + (first + place % height) * BLOCK_M, end, place // height


@triton.jit
def _halves(acc, SLICES: tl.constexpr):
    """The columns of a tile in 1, 2 or 4 equal slices, in order."""
    slices = (acc,)
    if SLICES > 1:
        rows: tl.constexpr = acc.shape[0]
        half: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (rows, 2, half)), (0, 2, 1)))
        slices = _halves(left, SLICES // 2) + _halves(right, SLICES // 2)
    return slices


@triton.jit
def _finish(
    acc,  # products of some columns
    first,  # the first of these columns
    row,
    real_row,
    weights_before,
    mean,
    rstd,
    sum_ptr,
    bias_ptr,
    residual_ptr,
    residual_stride,
    z_ptr,
    y_ptr,
    y_stride,
    y_parts_ptr,
    N,
    NORM: tl.constexpr,
    CENTRE_FIRST: tl.constexpr,
    GELU: tl.constexpr,
):
    """What comes behind the product: LayerNorm, bias, GELU, residual, the result and its statistics."""
    width: tl.constexpr = acc.shape[1]
    column = first + tl.arange(0, width)
    real_column = column < N
    real = real_row[:, None] & real_column[None, :]
    vector = weights_before + tl.minimum(column, N - 1)
    if NORM:
        if not CENTRE_FIRST:
            acc -= mean[:, None] * tl.load(sum_ptr + vector)[None, :]
        acc *= rstd[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + vector)[None, :]
    at = row[:, None] * y_stride + column[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + at, acc.to(z_ptr.dtype.element_ty), mask=real)
    if GELU:
        acc = 0.5 * acc * (1.0 + tl.erf(acc * _SQRT_HALF))
    if residual_ptr is not None:
        residual_at = residual_ptr + row[:, None] * residual_stride + column[None, :]
        acc += tl.load(residual_at, mask=real, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=real)
    if y_parts_ptr is not None:
        # Of what was stored, not of acc: these moments belong to the numbers that the next op reads.
        y = tl.where(real_column[None, :], y.to(tl.float32), 0.0)
        y_mean = tl.sum(y, 1) / tl.minimum(N - first, width)
        shift = tl.where(real_column[None, :], y - y_mean[:, None], 0.0)
        part_at = y_parts_ptr + (row * tl.cdiv(N, width) + first // width) * 2
        real_part = tl.where(real_row, first, N) < N
        tl.store(part_at, y_mean, mask=real_part)
        tl.store(part_at + 1, tl.sum(shift * shift, 1), mask=real_part)


@triton.jit(do_not_specialize=["start", "end0", "end1", "end2", "eps"])
def expert_linear_kernel(
    x_ptr,  # [M, K]; with TMA a descriptor of it
    x_stride,
    weight_ptr,  # [E, N, K], contiguous; with TMA a descriptor of [E * N, K]
    sum_ptr,  # fp32 [E, N]
    bias_ptr,  # fp32 [E, N] or None
    parts_ptr,  # fp32 [M, T, 2] of x, or None: no LayerNorm
    num_parts,
    part_width,
    eps,
    residual_ptr,  # [M, N] or None
    residual_stride,
    rows_ptr,  # int64 [R] or None: row r is row rows[r] of x, residual and y
    z_ptr,  # [M, N] or None: what GELU is taken of
    y_ptr,  # [M, N]
    y_stride,  # of z, too
    y_parts_ptr,  # fp32 [M, cdiv(N, BLOCK_N / SLICES), 2] or None
    start,  # rows of the experts: [start, end0), [end0, end1), [end1, end2)
    end0,
    end1,
    end2,
    K,
    N,
    GELU: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two that holds num_parts
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    NORM: tl.constexpr = parts_ptr is not None
    CENTRE_FIRST: tl.constexpr = NORM and dtype == tl.float32
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.cdiv(end0 - start, BLOCK_M) + tl.cdiv(end1 - end0, BLOCK_M)
    tiles_m += tl.cdiv(end2 - end1, BLOCK_M)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        expert, first, end, tile_n = _locate(
            tile, tiles_n, start, end0, end1, end2, BLOCK_M, GROUP_M
        )
        # Rows and columns past the end repeat the last one: nothing strange is read, and nothing of it is stored.
        place = first + tl.arange(0, BLOCK_M)
        row = tl.minimum(place, end - 1).to(tl.int64)
        if rows_ptr is not None:
            row = tl.load(rows_ptr + row)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_row = expert.to(tl.int64) * N + tl.minimum(column, N - 1)
        mean, rstd = 0.0, 0.0
        if NORM:
            mean, rstd = moments(parts_ptr, row, num_parts, part_width, K, eps, PARTS)

        depth = tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            if TMA:
                # Zero past the tensor's end; rows and columns of another expert are real, and are not stored.
                x = x_ptr.load([first, k])
                w = weight_ptr.load([expert * N + tile_n * BLOCK_N, k]).T
            else:
                x_at = x_ptr + row[:, None] * x_stride + (k + depth)[None, :]
                x = tl.load(x_at, mask=depth[None, :] < K - k, other=0.0)
                weight_at = weight_ptr + weight_row[None, :] * K + (k + depth)[:, None]
                w = tl.load(weight_at, mask=depth[:, None] < K - k, other=0.0)
            if CENTRE_FIRST:
                x -= mean[:, None]
            acc = tl.dot(x, w, acc, input_precision="ieee")

        # In slices of columns: what is added to a whole tile would not fit into registers beside it.
        width: tl.constexpr = BLOCK_N // SLICES
        slices = _halves(acc, SLICES)
        for i in tl.static_range(SLICES):
            _finish(
                slices[i],
                tile_n * BLOCK_N + i * width,
                row,
                place < end,
                expert.to(tl.int64) * N,
                mean,
                rstd,
                sum_ptr,
                bias_ptr,
                residual_ptr,
                residual_stride,
                z_ptr,
                y_ptr,
                y_stride,
                y_parts_ptr,
                N,
                NORM,
                CENTRE_FIRST,
                GELU,
            )


def expert_linear(
    x: Tensor,
    folded: FoldedWeights,
    residual: Tensor | None,
    rows: Tensor | None,
    bounds: Sequence[int],
    eps: float,
    activation: str,
    *,
    statistics: RowStatistics | None = None,
    with_statistics: bool = False,
    z: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, RowStatistics | None]:
    """Rows x [M, K] (fp32, fp16, bf16; elements of a row side by side) by experts; y [M, N] and its statistics.

    ``bounds``, ``rows``, ``residual``, ``activation``: as in ``beit3_fast.ops.expert_linear``. ``statistics`` of x
    are computed where LayerNorm needs them and they are not given. ``z`` [M, N], contiguous, takes what GELU is taken
    of, at the rows of the experts. Arguments are trusted.
    """
    features, out = x.shape[1], folded.weights.shape[1]
    if tile is None:
        plain = folded.sums is None and residual is None and activation == "none"
        own_class = shape_class(x.dtype, bounds[-1], features, out, plain=plain)
        tile = _tiles.choose(Tile, "expert_linear", own_class, _tiles.architecture(x.device))
    # Rows that ``rows`` does not name are zero.
    allocate = x.new_empty if rows is None else x.new_zeros
    y = allocate(x.shape[0], out)
    tiles_n = triton.cdiv(out, tile.block_n)
    y_parts = None
    width = tile.block_n // tile.slices
    if with_statistics:
        shape = (x.shape[0], triton.cdiv(out, width), 2)
        y_parts = allocate(shape, dtype=torch.float32)
    parts, part_width = None, 0
    if folded.sums is not None:
        given = row_statistics(x, rows) if statistics is None else joined(statistics, features)
        parts, part_width = given
    num_parts = 0 if parts is None else parts.shape[1]
    tma = tile.tma and rows is None and all(map(_fits_tma, (x, folded.weights)))
    for e, own in expert_groups(bounds):
        tiles = tiles_n * sum(triton.cdiv(b - a, tile.block_m) for a, b in pairwise(own))
        if not tiles:
            continue
        operand, weights = x, folded.weights[e:]
        if tma:
            operand = TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k])
            weights = TensorDescriptor.from_tensor(
                weights.flatten(0, 1), [tile.block_n, tile.block_k]
            )
        expert_linear_kernel[(min(tiles, tile.per_sm * _multiprocessors(x.device)),)](
            operand,
            x.stride(0),
            weights,
            None if folded.sums is None else folded.sums[e:],
            None if folded.biases is None else folded.biases[e:],
            parts,
            num_parts,
            part_width,
            eps,
            residual,
            0 if residual is None else residual.stride(0),
            rows,
            z,
            y,
            y.stride(0),
            y_parts,
            *own,
            features,
            out,
            GELU=activation == "gelu",
            TMA=tma,
            PARTS=triton.next_power_of_2(max(num_parts, 1)),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m,
            SLICES=tile.slices,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y, None if y_parts is None else RowStatistics(y_parts, width)


def expert_groups(bounds: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """The experts of each launch: the first of them, and MAX_EXPERTS + 1 row numbers, the last one repeated."""
    for e in range(0, len(bounds) - 1, MAX_EXPERTS):
        own = [*bounds[e : e + MAX_EXPERTS + 1]]
        yield e, own + own[-1:] * (MAX_EXPERTS + 1 - len(own))


def shape_class(
    dtype: torch.dtype, rows: int, features: int, out: int, *, plain: bool = False
) -> str:
    """The class of ``tiles/*.json`` for a product of ``rows`` rows, K = ``features`` and N = ``out``.

    ``plain``: no LayerNorm, GELU or residual, as in the head over 64,010 tokens, whose speed counts.
    """
    if dtype == torch.float32:
        return "fp32"
    if features % 16 or (out % 16 and not plain):
        # Loads of single elements take an address and a mask each: in large tiles these spill.
        return "odd sizes"
    if rows <= 256:
        return "few rows"
    # Single elements are stored as well, which the largest tile has no registers for.
    return "odd columns" if out % 16 else "many rows"


def _fits_tma(t: Tensor) -> bool:
    """Whether the tensor memory accelerator can address the rows.

    They begin at multiples of 16 bytes, and none in another one: descriptors take no stride of zero.
    """
    apart = t.stride(-2) >= t.shape[-1]
    return apart and t.data_ptr() % 16 == 0 and t.stride(-2) * t.element_size() % 16 == 0


@cache
def _multiprocessors(device: torch.device) -> int:
    """A few in the interpreter, so that a program has several tiles there, too."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
