"""Calls of the ops with operands that fit; tests put others in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import Norm, expert_linear, shared_attention


def name_of(value: Any) -> str:
    """A test's name, the same in every process: the names of the bad arguments, or the message."""
    return "+".join(value) if isinstance(value, dict) else str(value)


x, weight, bias, gamma, residual = (
    torch.randn(6, 8),
    torch.randn(4, 8),
    torch.randn(4),
    torch.ones(8),
    torch.randn(6, 4),
)


def linear(**changes: Any) -> Tensor:
    options: dict[str, Any] = {
        "x": x,
        "weights": [weight],
        "biases": [bias],
        "bounds": (0, 6),
        "norm": Norm([gamma], [gamma]),
        "activation": "gelu",
        "residual": residual,
    }
    options |= changes
    return expert_linear(**options)


layout = TokenLayout.from_lengths([2, 1], [1, 2])
q = torch.randn(6, 8)


def attention(**changes: Any) -> Tensor:
    options: dict[str, Any] = {"q": q, "k": q, "v": q, "layout": layout, "num_heads": 2} | changes
    return shared_attention(**options)
