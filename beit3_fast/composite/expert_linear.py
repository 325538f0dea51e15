"""expert_linear from LayerNorm, linear and GELU calls of PyTorch, and its gradient formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.composite._layer_norm import layer_norm, layer_norm_gradients
from beit3_fast.derived import derived, needs_grad


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
    """Arguments and result as in ``beit3_fast.reference.expert_linear``; obeys autocast and autograd."""
    if rows is not None:
        gathered = None if residual is None else residual[rows]
        y = expert_linear(
            x[rows],
            weights,
            biases,
            norm_weights,
            norm_biases,
            gathered,
            None,
            bounds,
            eps,
            activation,
        )
        return y.new_zeros(x.shape[0], y.shape[1]).index_copy(0, rows, y)
    parts = []
    # One split, whose gradient is one concatenation; that of a slice would be as large as x, for each expert.
    sizes = [stop - start for start, stop in pairwise(bounds)]
    ranges = x.split(sizes) if len(weights) > 1 else (x,)
    for expert, (weight, part) in enumerate(zip(weights, ranges, strict=True)):
        if norm_weights:
            part = layer_norm(part, norm_weights[expert], norm_biases[expert], eps)
        bias = biases[expert] if biases else None
        parts.append(_linear(part, weight, bias, activation))
    if len(parts) == 1:
        return parts[0] if residual is None else residual + parts[0]
    if residual is None:
        return torch.cat(parts)
    if needs_grad(residual, *parts) or torch.compiler.is_compiling():
        return residual + torch.cat(parts)
    # One pass instead of a concatenation followed by an addition.
    y = residual.new_empty(
        residual.shape, dtype=torch.promote_types(residual.dtype, parts[0].dtype)
    )
    for expert, part in enumerate(parts):
        own = slice(bounds[expert], bounds[expert + 1])
        torch.add(residual[own], part, out=y[own])
    return y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    x = _dense(x)
    if _prepacks(x, weight, bias):
        packed = derived(
            "onednn", (weight,), lambda: torch.ops.mkldnn._reorder_linear_weight(weight, None)
        )
        name, algorithm = ("gelu", "none") if activation == "gelu" else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)
    y = F.linear(x, weight, bias)
    return F.gelu(y) if activation == "gelu" else y


def _dense(x: Tensor) -> Tensor:
    """x for a product that reads nothing else: oneDNN on AMX multiplies zeros by what lies behind bf16 rows of a length off 32."""
    if x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.shape[-1] % 32:
        return x.contiguous()
    return x


def _prepacks(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's prepacked product applies: bf16 inference on a CPU."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.shape[0] > 0
        and not needs_grad(x, weight, *(() if bias is None else (bias,)))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class GradientSteps(NamedTuple):
    """What the gradients are made of: ``times(dy, w)`` = dy w, ``outer(dy, x)`` = dy^T x, and ``layer_norm(dy, x, weight, bias,
    mean, rstd, eps)``, the gradients of x, weight and bias."""

    times: Callable[[Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor], Tensor]
    layer_norm: Callable[..., tuple[Tensor, Tensor, Tensor]]


PLAIN = GradientSteps(torch.mm, lambda dy, x: dy.T @ x, layer_norm_gradients)


def expert_linear_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    rows: Tensor | None,
    bounds: Sequence[int],
    eps: float,
    activation: str,
    steps: GradientSteps = PLAIN,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of x, weights, biases, norm weights and norm biases, given that of the result [M, O].

    The normalised operand and the pre-activation are recomputed. The residual's gradient is ``grad`` itself
    on the rows named by ``rows``.
    """
    sorted_grad = grad if rows is None else grad[rows]
    sorted_x = x if rows is None else x[rows]
    dx_parts: list[Tensor] = []
    dweights: list[Tensor] = []
    dbiases: list[Tensor] = []
    dgammas: list[Tensor] = []
    dbetas: list[Tensor] = []
    for expert, weight in enumerate(weights):
        own = slice(bounds[expert], bounds[expert + 1])
        operand, dy = sorted_x[own], sorted_grad[own]
        if norm_weights:
            gamma, beta = norm_weights[expert], norm_biases[expert]
            shape = list(operand.shape[-1:])
            normed, mean, rstd = torch.ops.aten.native_layer_norm(operand, shape, gamma, beta, eps)
        else:
            normed = operand
        if activation == "gelu":
            z = F.linear(_dense(normed), weight, biases[expert] if biases else None)
            dy = torch.ops.aten.gelu_backward(dy, z)
        dweights.append(steps.outer(dy, normed))
        if biases:
            dbiases.append(dy.sum(0))
        part = steps.times(dy, weight)
        if norm_weights:
            part, dgamma, dbeta = steps.layer_norm(part, operand, gamma, beta, mean, rstd, eps)
            dgammas.append(dgamma)
            dbetas.append(dbeta)
        dx_parts.append(part)
    dx = dx_parts[0] if len(dx_parts) == 1 else torch.cat(dx_parts)
    if rows is not None:
        dx = torch.zeros_like(x).index_add(0, rows, dx)
    return dx, dweights, dbiases, dgammas, dbetas


def residual_gradient(grad: Tensor, rows: Tensor | None) -> Tensor:
    """Gradient of the residual, given that of the result [M, O]: none for rows that ``rows`` does not name."""
    return grad if rows is None else torch.zeros_like(grad).index_copy(0, rows, grad[rows])
