"""expert_linear by its formula: rows of expert e meet the weights of expert e."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def expert_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    residual: Tensor | None,
    rows: Tensor | None,
    bounds: Sequence[int],
    eps: float,
    activation: str,
) -> Tensor:
    """y[r] = activation(LayerNorm_e(x[r]) W_e^T + b_e) + residual[r] for bounds[e] <= r < bounds[e + 1].

    x [M, I], weights [O, I] each, result [M, O] in x's dtype. With ``rows`` int64 [R], sorted row r stands
    for row rows[r] of x, residual and result; rows of the result that it does not name are zero. Computed in
    fp32, in fp64 for fp64 operands; one rounding at the end.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    sorted_x = (x if rows is None else x[rows]).to(compute)
    parts = []
    for expert, weight in enumerate(weights):
        part = sorted_x[bounds[expert] : bounds[expert + 1]]
        if norm_weights:
            mean = part.mean(-1, keepdim=True)
            variance = (part - mean).square().mean(-1, keepdim=True)
            part = (part - mean) / torch.sqrt(variance + eps)
            part = part * norm_weights[expert].to(compute) + norm_biases[expert].to(compute)
        part = part @ weight.to(compute).T
        if biases:
            part = part + biases[expert].to(compute)
        parts.append(activated(part, activation))
    return placed(torch.cat(parts), x, residual, rows)


def activated(part: Tensor, activation: str) -> Tensor:
    """Exact GELU, or nothing for "none"."""
    return part * 0.5 * (1.0 + torch.erf(part * 0.5**0.5)) if activation == "gelu" else part


def placed(y: Tensor, x: Tensor, residual: Tensor | None, rows: Tensor | None) -> Tensor:
    """Sorted rows y at their rows of the result, plus the residual there; the last rounding, to x's dtype."""
    if rows is not None:
        y = y.new_zeros(x.shape[0], y.shape[1]).index_copy(0, rows, y)
    if residual is not None:
        addend = residual.to(y.dtype)
        if rows is not None:
            named = torch.zeros(x.shape[0], 1, dtype=torch.bool, device=x.device)
            addend = addend * named.index_fill(0, rows, True)
        y = y + addend
    return y.to(x.dtype)
