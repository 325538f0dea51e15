"""The gradients of expert_linear on a GPU: no atomics, the same bits in every run.

    dz = dy gelu'(z)      g = dz W'      dx = rstd (g - mean(g) - x' mean(g x'))      D = dz^T x'
    dW = gamma D + db beta^T      db = sum_r dz      dgamma = sum_n W D      dbeta = W^T db

x' is the normalised row, W' = W diag(gamma), z the pre-activation. The forward pass keeps z, for GELU only; x' is
computed again. The gradients of the LayerNorm's parameters come from those of the weights: no pass over the
activations is made for them. Five launches:

    slope_kernel            dz in the order of the experts (where it is not dy itself), and its column sums
    expert_linear_kernel    g, as a product of dz with the transposed W'
    norm_backward_kernel    dx from g, and x' beside it: both need the same row
    weight_gradient_kernel  D, and
    finish_kernel           dW, dgamma and dbeta: ``_weight_gradient.py``

Letters as in ``expert_linear.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from beit3_fast.kernels._weight_gradient import finish, weight_gradient
from beit3_fast.kernels.expert_linear import (
    _SQRT_HALF,
    FoldedWeights,
    Tile,
    _locate,
    expert_groups,
)
from torch import Tensor

from beit3_fast.kernels import expert_linear as forward

_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_SLOPE_ROWS, _SLOPE_COLUMNS = 64, 64


class Gradients(NamedTuple):
    """Of all operands but the residual, in their dtypes; empty lists where there are no biases or no LayerNorm."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]


@triton.jit(do_not_specialize=["start", "end0", "end1", "end2"])
def slope_kernel(
    grad_ptr,  # [M, N]
    grad_stride,
    z_ptr,  # [M, N], contiguous, or None: no GELU
    rows_ptr,  # int64 [R] or None
    dz_ptr,  # [R, N], contiguous, or None; written
    sums_ptr,  # fp32 [row tiles, N] or None: column sums of dz; written
    start,
    end0,
    end1,
    end2,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile = tl.program_id(0)
    _, first, end, _ = _locate(tile, 1, start, end0, end1, end2, BLOCK_M, 1)
    place = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    row = place
    if rows_ptr is not None:
        row = tl.load(rows_ptr + place, mask=place < end, other=0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = (place < end)[:, None] & (column < N)[None, :]
    grad_at = grad_ptr + row[:, None] * grad_stride + column[None, :]
    dz = tl.load(grad_at, mask=real, other=0.0).to(tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + row[:, None] * N + column[None, :], mask=real, other=0.0)
        z = z.to(tl.float32)
        bell = tl.exp(-0.5 * z * z) * _INV_SQRT_2PI
        dz *= 0.5 * (1.0 + tl.erf(z * _SQRT_HALF)) + z * bell
    if dz_ptr is not None:
        rounded = dz.to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + place[:, None] * N + column[None, :], rounded, mask=real)
    if sums_ptr is not None:
        tl.store(sums_ptr + tile * N + column, tl.sum(dz, 0), mask=column < N)


@triton.jit(do_not_specialize=["num_rows", "eps"])
def norm_backward_kernel(
    x_ptr,  # [M, K]
    x_stride,
    g_ptr,  # [R, K], contiguous
    rows_ptr,  # int64 [R] or None
    dx_ptr,  # [M, K], contiguous, written
    normed_ptr,  # [R, K], contiguous, written: x'
    num_rows,  # R
    K,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
):
    place = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    real_row = place < num_rows
    row = place
    if rows_ptr is not None:
        row = tl.load(rows_ptr + place, mask=real_row, other=0)
    column = tl.arange(0, BLOCK_K)
    real = real_row[:, None] & (column < K)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=real, other=0.0)
    x = x.to(tl.float32)
    shift = tl.where(real, x - (tl.sum(x, 1) / K)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(shift * shift, 1) / K + eps)
    normed = shift * rstd[:, None]
    at = place[:, None] * K + column[None, :]
    g = tl.load(g_ptr + at, mask=real, other=0.0).to(tl.float32)
    along = tl.sum(g * normed, 1) / K
    dx = (g - (tl.sum(g, 1) / K)[:, None] - normed * along[:, None]) * rstd[:, None]
    dx_at = dx_ptr + row[:, None] * K + column[None, :]
    tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=real)
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=real)


def expert_linear_backward(
    grad: Tensor,
    x: Tensor,
    folded: FoldedWeights,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    z: Tensor | None,
    rows: Tensor | None,
    bounds: Sequence[int],
    eps: float,
    *,
    tile: Tile | None = None,
) -> Gradients:
    """Gradients given that of the result, [M, N], and what the forward pass kept: ``folded``, and z [M, N] for GELU.

    Rows of dx that ``rows`` does not name are zero. The residual's gradient is ``grad`` itself at the named rows.
    ``tile`` is that of the product which sums over rows. Arguments are trusted.
    """
    norm, count = bool(norm_weights), bounds[-1]
    dz, dbiases = _slope(grad, z, rows, bounds, with_sums=norm or bool(biases))
    turned = FoldedWeights(folded.weights.transpose(1, 2).contiguous(), None, None)
    g, _ = forward.expert_linear(dz, turned, None, None, bounds, 0.0, "none")
    if norm:
        dx, operand = _norm_backward(x, g, rows, count, eps)
    elif rows is None:
        dx, operand = g, x
    else:
        dx, operand = x.new_zeros(x.shape).index_copy_(0, rows, g), x[rows]
    parts, places = weight_gradient(dz, operand, bounds, tile)
    dweights, dgammas, dbetas = [], [], []
    for e, weight in enumerate(weights):
        vectors = (norm_weights[e], norm_biases[e]) if norm else ()
        own = dbiases[e] if norm else None
        dweight, dgamma, dbeta = finish(parts, places[e], places[e + 1], weight, own, *vectors)
        dweights.append(dweight)
        if norm:
            dgammas.append(dgamma.to(vectors[0].dtype))
            dbetas.append(dbeta.to(vectors[1].dtype))
    biased = [own.to(bias.dtype) for own, bias in zip(dbiases, biases, strict=False)]
    return Gradients(dx, dweights, biased, dgammas, dbetas)


def _slope(
    grad: Tensor, z: Tensor | None, rows: Tensor | None, bounds: Sequence[int], with_sums: bool
) -> tuple[Tensor, list[Tensor]]:
    """dz [R, N] in the order of the experts, and its column sums fp32 [N] of each expert (none: an empty list)."""
    out, written = grad.shape[1], z is not None or rows is not None
    dz = grad.new_empty(bounds[-1], out) if written else grad
    sums: list[Tensor] = []
    for _, own in expert_groups(bounds):
        heights = [triton.cdiv(b - a, _SLOPE_ROWS) for a, b in pairwise(own)]
        parts = None
        if with_sums:
            parts = torch.empty(sum(heights), out, dtype=torch.float32, device=grad.device)
        if sum(heights) and (written or with_sums):
            slope_kernel[(sum(heights), triton.cdiv(out, _SLOPE_COLUMNS))](
                grad,
                grad.stride(0),
                z,
                rows,
                dz if written else None,
                parts,
                *own,
                out,
                BLOCK_M=_SLOPE_ROWS,
                BLOCK_N=_SLOPE_COLUMNS,
            )
        if parts is not None:
            sums += [part.sum(0) for part in parts.split(heights)]
    return dz, sums


def _norm_backward(
    x: Tensor, g: Tensor, rows: Tensor | None, count: int, eps: float
) -> tuple[Tensor, Tensor]:
    """dx [M, K] and the normalised rows [R, K] in the order of the experts."""
    features = x.shape[1]
    dx = (x.new_empty if rows is None else x.new_zeros)(x.shape)
    normed = x.new_empty(count, features)
    block_k = triton.next_power_of_2(features)
    block_r = max(1, 2048 // block_k)
    if count:
        norm_backward_kernel[(triton.cdiv(count, block_r),)](
            x,
            x.stride(0),
            g,
            rows,
            dx,
            normed,
            count,
            features,
            eps,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            num_warps=8 if block_k > 2048 else 4,
        )
    return dx, normed
