"""expert_linear with both operands of its products in 8 bits, by its formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3_fast.float8 import Quantized, dequantize, quantize
from beit3_fast.reference.expert_linear import activated, placed


def float8_linear(
    x: Tensor,
    weights: Sequence[Quantized],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    residual: Tensor | None,
    rows: Tensor | None,
    bounds: Sequence[int],
    eps: float,
    activation: str,
) -> Tensor:
    """As ``reference.expert_linear``, the rows rounded with a scale for every 128 columns; weights: one scale a channel.

    The rows are rounded as they come, for the op that wrote them cannot know more of a row than a tile: LayerNorm's
    weight multiplies them first, its mean and deviation, those of the rows as they were, come behind the product.
    A row whose mean is several of its deviations thus loses more than LayerNorm in front would lose.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    sorted_x = (x if rows is None else x[rows]).to(compute)
    parts = []
    for expert, weight in enumerate(weights):
        part = sorted_x[bounds[expert] : bounds[expert + 1]]
        plain = dequantize(weight, part.shape[1]).to(compute)
        if norm_weights:
            gamma, beta = norm_weights[expert].to(compute), norm_biases[expert].to(compute)
            mean = part.mean(-1, keepdim=True)
            deviation = torch.sqrt((part - mean).square().mean(-1, keepdim=True) + eps)
            rounded = dequantize(quantize(part * gamma)).to(compute)
            part = (rounded @ plain.T - mean * (plain @ gamma)) / deviation + plain @ beta
        else:
            part = dequantize(quantize(part)).to(compute) @ plain.T
        if biases:
            part = part + biases[expert].to(compute)
        parts.append(activated(part, activation))
    return placed(torch.cat(parts), x, residual, rows)
