"""Pairs, and two processes that have half of them each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.composite import masked_linear_cross_entropy as slices
from beit3_fast.data.pair_batch import PairBatch
from beit3_fast.errors import ShapeError
from beit3_fast.model import create_model
from beit3_fast.train.contrastive import ContrastiveTuning, contrastive_loss

N, WIDTH = 5, 7
"""Pairs of a process, and their width."""


def features(requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Two processes' images and texts, fp64 [2 * N, WIDTH] of unit length, and a scale."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(2, 2 * N, WIDTH, dtype=torch.float64, generator=generator)
    vision, language = F.normalize(drawn, dim=-1)
    scale = torch.tensor(6.0, dtype=torch.float64)
    vision, language, scale = (
        own.clone().requires_grad_(requires_grad) for own in (vision, language, scale)
    )
    return vision, language, scale


def batch(dtype: torch.dtype = torch.float64) -> PairBatch:
    """Two processes' pairs."""
    generator = torch.Generator().manual_seed(4)
    return PairBatch(
        torch.randn(2 * N, 3, 32, 32, generator=generator).to(dtype),
        torch.randint(0, 100, (2 * N, 6), generator=generator),
        torch.arange(6)[None] >= torch.randint(2, 7, (2 * N, 1), generator=generator),
    )


def retrieval_model() -> Any:
    """The same weights in every process."""
    torch.manual_seed(5)
    return create_model("beit3_tiny_patch16_32_retrieval", dtype="float64", impl="composite")


def gradients(
    model: Any, own: PairBatch, totals: dict[str, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of the loss, and its gradients."""
    share, _ = ContrastiveTuning()(model, own, totals)
    share.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return share.detach(), grads


def half(rank: int) -> dict[str, Any]:
    """What one of two processes gets for its half, in slices of three columns."""
    slices._LOGITS, slices._THINNEST = 1, 3
    rows = slice(rank * N, (rank + 1) * N)
    vision, language, scale = features()
    own = [part.clone().requires_grad_() for part in (vision[rows], language[rows], scale)]
    loss = contrastive_loss(*own)
    loss.backward()
    whole = batch()
    part = replace(whole, **{name: tensor[rows] for name, tensor in vars(whole).items()})
    share, grads = gradients(retrieval_model(), part, {"pairs": 2 * N})
    try:
        contrastive_loss(vision[: N - rank], language[: N - rank], scale)
        said = ""
    except ShapeError as error:
        said = str(error)
    names = ("vision", "language", "scale")
    result: dict[str, Any] = {name: tensor.grad for name, tensor in zip(names, own, strict=True)}
    return result | {"loss": loss.detach(), "share": share, "grads": grads, "uneven": said}
