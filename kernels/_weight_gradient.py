"""The weights' gradients of expert_linear: products that sum over the rows of an expert, in parts, and their end.

    D = dz^T x'      dW = gamma D + db beta^T      dgamma = sum_n W D      dbeta = sum_n W db

The rows are many and the result is small: with one program for each of its tiles most multiprocessors had nothing to
do. So each expert's rows are cut into parts, each with a result of its own in fp32, and ``finish_kernel`` sums these
in their order. Letters as in ``expert_linear.py``; P parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from beit3_fast.kernels.expert_linear import (
    MAX_EXPERTS,
    Tile,
    _fits_tma,
    _halves,
    _locate,
    _multiprocessors,
    expert_groups,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from beit3_fast.kernels import _tiles

_FINISH_ROWS, _FINISH_COLUMNS = 64, 64
# Fewer rows than this are no part of their own: what the parts cost would show.
_SHORTEST_PART = 512


@triton.jit
def _load_block(
    ptr, first, end, stride, column, width, REAL_ROWS: tl.constexpr, ROWS: tl.constexpr
):
    """[ROWS, columns], zero past the width, and past the rows' end unless they are all real."""
    row = first + tl.arange(0, ROWS)
    real = (column < width)[None, :]
    if not REAL_ROWS:
        real = real & (row < end)[:, None]
    at = ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(at, mask=real, other=0.0)


@triton.jit(do_not_specialize=["start", "end0", "end1", "end2", "part_rows"])
def weight_gradient_kernel(
    dz_ptr,  # [R, N]
    dz_stride,
    operand_ptr,  # [R, K]
    operand_stride,
    dz_tma,  # descriptors of both, or None
    operand_tma,
    parts_ptr,  # fp32 [P, N, K], written
    start,
    end0,
    end1,
    end2,
    part_rows,  # of a part at most; it belongs to one expert
    N,
    K,
    BLOCK_M: tl.constexpr,  # of N
    BLOCK_N: tl.constexpr,  # of K
    BLOCK_K: tl.constexpr,  # rows of a step
    SLICES: tl.constexpr,
):
    # All tiles of a part run side by side, so that its rows are read once.
    tiles_n = tl.cdiv(K, BLOCK_N)
    tiles = tl.cdiv(N, BLOCK_M) * tiles_n
    part = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    _, begin, end, _ = _locate(part, 1, start, end0, end1, end2, part_rows, 1)
    end = tl.minimum(end, begin + part_rows)
    first_n = tile // tiles_n * BLOCK_M
    first_k = tile % tiles_n * BLOCK_N
    n, k = first_n + tl.arange(0, BLOCK_M), first_k + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    whole = begin + (end - begin) // BLOCK_K * BLOCK_K
    for r in range(begin, whole, BLOCK_K):
        if dz_tma is not None:
            dz, operand = dz_tma.load([r, first_n]), operand_tma.load([r, first_k])
        else:
            dz = _load_block(dz_ptr, r, end, dz_stride, n, N, True, BLOCK_K)
            operand = _load_block(operand_ptr, r, end, operand_stride, k, K, True, BLOCK_K)
        acc = tl.dot(tl.trans(dz), operand, acc, input_precision="ieee")
    if whole < end:
        # Rows behind the end are another expert's, or another part's.
        dz = _load_block(dz_ptr, whole, end, dz_stride, n, N, False, BLOCK_K)
        operand = _load_block(operand_ptr, whole, end, operand_stride, k, K, False, BLOCK_K)
        acc = tl.dot(tl.trans(dz), operand, acc, input_precision="ieee")

    width: tl.constexpr = BLOCK_N // SLICES
    slices = _halves(acc, SLICES)
    own = parts_ptr + part.to(tl.int64) * N * K
    for i in tl.static_range(SLICES):
        column = first_k + i * width + tl.arange(0, width)
        real = (n < N)[:, None] & (column < K)[None, :]
        tl.store(own + n[:, None] * K + column[None, :], slices[i], mask=real)


@triton.jit(do_not_specialize=["first", "last"])
def finish_kernel(
    parts_ptr,  # fp32 [P, N, K]
    first,  # parts of this expert: [first, last)
    last,
    weight_ptr,  # [N, K], contiguous, or None: no LayerNorm
    dbias_ptr,  # fp32 [N]
    gamma_ptr,  # [K]
    beta_ptr,
    dweight_ptr,  # [N, K], contiguous, written
    columns_ptr,  # fp32 [row tiles, 2, K], written: sums of W D and of W db
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = (n < N)[:, None] & (k < K)[None, :]
    at = n[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for part in range(first, last):
        own = parts_ptr + tl.cast(part, tl.int64) * N * K
        total += tl.load(own + at, mask=real, other=0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=real, other=0.0).to(tl.float32)
        dbias = tl.load(dbias_ptr + n, mask=n < N, other=0.0)
        columns = columns_ptr + tl.program_id(0) * 2 * K + k
        tl.store(columns, tl.sum(weight * total, 0), mask=k < K)
        tl.store(columns + K, tl.sum(weight * dbias[:, None], 0), mask=k < K)
        gamma = tl.load(gamma_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        total = total * gamma[None, :] + dbias[:, None] * beta[None, :]
    tl.store(dweight_ptr + at, total.to(dweight_ptr.dtype.element_ty), mask=real)


def weight_gradient(
    dz: Tensor, operand: Tensor, bounds: Sequence[int], tile: Tile | None = None
) -> tuple[Tensor, list[int]]:
    """dz^T operand for each expert, in parts fp32 [P, N, K]; expert e has the parts places[e] to places[e + 1] - 1.

    dz [R, N] and operand [R, K], rows in the order of the experts; elements of a row side by side.
    """
    out, features = dz.shape[1], operand.shape[1]
    if tile is None:
        own_class = shape_class(dz.dtype, features, out)
        tile = _tiles.choose(Tile, "expert_linear", own_class, _tiles.architecture(dz.device))
    tiles = triton.cdiv(out, tile.block_m) * triton.cdiv(features, tile.block_n)
    # About two parts of every tile's rows for each program that can run at a time.
    wanted = max(1, 2 * tile.per_sm * _multiprocessors(dz.device) // tiles)
    part_rows = max(_SHORTEST_PART, triton.cdiv(bounds[-1] - bounds[0], wanted))
    part_rows = triton.cdiv(part_rows, tile.block_k) * tile.block_k
    places = [0]
    for a, b in pairwise(bounds):
        places.append(places[-1] + triton.cdiv(b - a, part_rows))
    parts = torch.empty(places[-1], out, features, dtype=torch.float32, device=dz.device)
    descriptors: list[TensorDescriptor | None] = [None, None]
    if tile.tma and _fits_tma(dz) and _fits_tma(operand):
        blocks = ([tile.block_k, tile.block_m], [tile.block_k, tile.block_n])
        descriptors = [
            TensorDescriptor.from_tensor(t, block)
            for t, block in zip((dz, operand), blocks, strict=True)
        ]
    for e, own in expert_groups(bounds):
        count = places[min(e + MAX_EXPERTS, len(bounds) - 1)] - places[e]
        if count:
            weight_gradient_kernel[(count * tiles,)](
                dz,
                dz.stride(0),
                operand,
                operand.stride(0),
                *descriptors,
                parts[places[e] :],
                *own,
                part_rows,
                out,
                features,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                BLOCK_K=tile.block_k,
                SLICES=tile.slices,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return parts, places


def shape_class(dtype: torch.dtype, features: int, out: int) -> str:
    """The class of ``tiles/*.json`` for the gradients of weights [out, features]; those of odd sizes as in ``expert_linear.py``."""
    words = ["fp32"] * (dtype == torch.float32) + ["odd"] * bool(features % 16 or out % 16)
    return " ".join([*words, "weights"])


def finish(
    parts: Tensor,
    first: int,
    last: int,
    weight: Tensor,
    dbias: Tensor | None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dW [N, K] of one expert from its parts; with LayerNorm (``dbias`` fp32 [N], gamma, beta) dgamma and dbeta fp32 [K]."""
    out, features = weight.shape
    dweight = weight.new_empty(out, features)
    height = triton.cdiv(out, _FINISH_ROWS)
    columns = torch.empty(height, 2, features, dtype=torch.float32, device=weight.device)
    finish_kernel[(height, triton.cdiv(features, _FINISH_COLUMNS))](
        parts,
        first,
        last,
        None if dbias is None else weight.contiguous(),
        dbias,
        None if gamma is None else gamma.contiguous(),
        None if beta is None else beta.contiguous(),
        dweight,
        columns,
        out,
        features,
        BLOCK_M=_FINISH_ROWS,
        BLOCK_N=_FINISH_COLUMNS,
    )
    return dweight, columns[:, 0].sum(0), columns[:, 1].sum(0)
