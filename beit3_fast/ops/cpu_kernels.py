"""The compiled CPU product as torch.compile calls it (row numbers may be symbolic, which its C++ schema cannot say), and
as gradients do."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from beit3_fast.composite.expert_linear import GradientSteps
from beit3_fast.ops import library
from beit3_fast.ops.dispatch import rows_in_memory


@torch.library.custom_op("beit3_fast::cpu_expert_linear", mutates_args=(), device_types="cpu")
def expert_linear(
    x: Tensor,
    weights: list[Tensor],
    packed: list[Tensor],
    biases: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    residual: Tensor | None,
    rows: Tensor | None,
    bounds: list[int],
    eps: float,
    activation: str,
) -> Tensor:
    """As ``beit3_fast.reference.expert_linear``; where there are ``packed`` weights, the others give only their shape."""
    library.load()
    vectors = (biases, norm_weights, norm_biases)
    y = torch.ops.beit3_fast.expert_linear(
        x, weights, packed, *vectors, residual, rows, bounds, eps, activation
    )
    return cast(Tensor, y)


@expert_linear.register_fake
def _(x: Tensor, weights: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0])


def _times(dy: Tensor, weight: Tensor) -> Tensor:
    return _product(dy, weight)


def _outer(dy: Tensor, x: Tensor) -> Tensor:
    return (
        _product(torch.ops.beit3_fast.transposed(rows_in_memory(dy)), x)
        if len(x)
        else dy.new_zeros(dy.shape[1], x.shape[1])
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N]."""
    packed = torch.ops.beit3_fast.pack_transposed(rows_in_memory(b))
    shape = b.new_empty(()).expand(b.shape[1], b.shape[0])
    none: list[Tensor] = []
    y = torch.ops.beit3_fast.expert_linear(
        rows_in_memory(a), [shape], [packed], none, none, none, None, None, [0, len(a)], 0.0, "none"
    )
    return cast(Tensor, y)


def _layer_norm(
    grad: Tensor, x: Tensor, weight: Tensor, _bias: Tensor, _mean: Tensor, _rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.ops.beit3_fast.layer_norm_gradients
    dx, dweight, dbias = gradients(rows_in_memory(grad), rows_in_memory(x), weight, eps)
    return dx, dweight, dbias


GRADIENTS = GradientSteps(_times, _outer, _layer_norm)
