"""expert_linear with both operands of its products in 8 bits, from PyTorch's fp32 calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.float8 import Quantized, dequantize, quantize


class Folded(NamedTuple):
    """What stands beside the product of an expert, fp32 [O] each: y = rstd (x W^T - mean sums) + constant."""

    sums: Tensor | None  # None: no LayerNorm
    constant: Tensor | None


def fold(plain: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> Folded:
    """For a weight [O, I] as it was rounded, in fp32."""
    own = None if bias is None else bias.float()
    if gamma is None or beta is None:
        return Folded(None, own)
    wide = plain.double()
    constant = (wide @ beta.double()).float()
    return Folded((wide @ gamma.double()).float(), constant if own is None else constant + own)


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
    """Arguments and result as in ``beit3_fast.reference.float8_linear``; sums in fp32, one rounding at the end."""
    sorted_x = x if rows is None else x[rows]
    parts = []
    for expert, weight in enumerate(weights):
        own = sorted_x[bounds[expert] : bounds[expert + 1]].float()
        if not own.shape[0]:
            continue
        plain = dequantize(weight, own.shape[1])
        norm = (norm_weights[expert], norm_biases[expert]) if norm_weights else (None, None)
        folded = fold(plain, biases[expert] if biases else None, *norm)
        scaled = own if norm[0] is None else own * norm[0].float()
        y = F.linear(dequantize(quantize(scaled)), plain)
        if folded.sums is not None:
            variance, mean = torch.var_mean(own, 1, correction=0, keepdim=True)
            y = (y - mean * folded.sums) * torch.rsqrt(variance + eps)
        y = y if folded.constant is None else y + folded.constant
        parts.append(F.gelu(y) if activation == "gelu" else y)
    if not parts:
        return x.new_zeros(x.shape[0], weights[0].numbers.shape[0])
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    if residual is not None:
        y = y + (residual if rows is None else residual[rows]).float()
    y = y.to(x.dtype)
    return y if rows is None else y.new_zeros(x.shape[0], y.shape[1]).index_copy(0, rows, y)
