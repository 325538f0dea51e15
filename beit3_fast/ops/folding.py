"""Weights with their LayerNorm inside, kept as long as what they were made of is unchanged."""

from __future__ import annotations

import torch
from torch import Tensor

from beit3_fast.derived import derived
from beit3_fast.kernels._folded_weights import FoldedWeights, fold


def folded_weights(
    weights: list[Tensor],
    parts: list[Tensor],
    biases: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
) -> FoldedWeights:
    """The weights with their LayerNorm inside, once for every state of their sources."""
    each = len(parts) // len(weights)

    def make() -> FoldedWeights:
        whole = weights
        if parts:
            whole = [torch.cat(parts[i : i + each]) for i in range(0, len(parts), each)]
        return fold(whole, biases, norm_weights, norm_biases)

    # The same sources may be one expert's or several experts'.
    shape = (each, len(weights), len(biases), len(norm_weights))
    sources = [*(parts or weights), *biases, *norm_weights, *norm_biases]
    return derived(f"folded {shape}", sources, make)
