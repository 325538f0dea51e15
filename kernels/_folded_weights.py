"""Weights with their LayerNorm inside, as the Triton and the CUDA kernels read them (see expert_linear.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class FoldedWeights(NamedTuple):
    """The weights of all experts with their LayerNorm inside."""

    weights: Tensor  # [E, N, K] in the dtype of the rows
    sums: Tensor | None  # fp32 [E, N]; None: no LayerNorm
    biases: Tensor | None  # fp32 [E, N]


def fold(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
) -> FoldedWeights:
    """Weights [N, K], biases [N] (none or one each), LayerNorm weights and biases [K] (likewise), made one."""
    given = torch.stack([bias.float() for bias in biases]) if biases else None
    plain = torch.stack(list(weights)) if len(weights) > 1 else weights[0][None].contiguous()
    if not norm_weights:
        return FoldedWeights(plain, None, given)
    gamma, beta = (torch.stack(list(group)).double() for group in (norm_weights, norm_biases))
    folded = (plain.float() * gamma.float()[:, None, :]).to(plain.dtype)
    constant = torch.einsum("enk,ek->en", plain.double(), beta).float()
    sums = folded.sum(-1, dtype=torch.float64).float()
    return FoldedWeights(folded, sums, constant if given is None else constant + given)
