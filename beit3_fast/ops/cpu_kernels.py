"""The compiled CPU product as torch.compile calls it: row numbers may be symbolic, which its C++ schema cannot say."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from beit3_fast.ops import library


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
