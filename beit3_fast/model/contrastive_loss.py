"""The contrastive loss between matching images and texts, over the batches of all processes.

The texts (or images) of all processes are the classes of a linear head, so the fused loss of such heads serves: it holds no
more than a slice of the scores [N, R * N] at a time and computes them again in its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_fast.errors import ShapeError
from beit3_fast.ops import masked_linear_cross_entropy


def contrastive_loss(vision: Tensor, language: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy (InfoNCE) of ``scale`` * vision @ language.T, whose matches are on the diagonal.

    vision and language [N, C], of unit length, floating-point; ``scale`` a scalar. Where torch.distributed is initialised, with
    R processes, each gives N pairs and gets the mean over its own rows against all R * N columns: the mean of the
    results is the loss of one process with all pairs, and so is the sum of the processes' gradients over R, for gradients
    flow back through the gathering. Computed in fp32 (fp64 for fp64), also under autocast. Raises ShapeError for embeddings that do not
    match and for processes with different N.
    """
    if vision.dim() != 2 or vision.shape != language.shape or not len(vision):
        raise ShapeError(
            "vision and language must both be [N, C] with at least one pair, got "
            f"{list(vision.shape)} and {list(language.shape)}"
        )
    with torch.autocast(vision.device.type, enabled=False):
        compute = torch.promote_types(vision.dtype, torch.float32)
        vision, language, scale = (own.to(compute) for own in (vision, language, scale))
        all_vision, all_language, first = _of_all_ranks(vision, language)
        rows = torch.arange(len(vision), device=vision.device)
        to_text, to_image = (
            masked_linear_cross_entropy(scale * own, others, None, rows, rows + first)
            for own, others in ((vision, all_language), (language, all_vision))
        )
        return (to_text + to_image) / 2


def _of_all_ranks(vision: Tensor, language: Tensor) -> tuple[Tensor, Tensor, int]:
    """The embeddings of all processes, in the order of their ranks, and where this one's begin."""
    if not (dist.is_available() and dist.is_initialized()):
        return vision, language, 0
    _check_counts(vision)
    # One collective, and one in the backward pass: two could meet in another order on another rank.
    gathered: Tensor = _Gather.apply(torch.cat([vision, language], dim=1))
    all_vision, all_language = gathered.chunk(2, dim=1)
    return all_vision, all_language, dist.get_rank() * len(vision)


class _Gather(torch.autograd.Function):
    """The rows of all processes; each gets back the sum of what all found for its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parts = [part.contiguous() for part in grad.chunk(dist.get_world_size())]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own


def _check_counts(vision: Tensor) -> None:
    own = torch.tensor([len(vision)], device=vision.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    numbers = [int(count) for count in counts]
    if len(set(numbers)) > 1:
        raise ShapeError(
            f"every process must give the same number of pairs, got {numbers}; drop the last, smaller batch"
        )
