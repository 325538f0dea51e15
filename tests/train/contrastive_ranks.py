"""Pairs, and two processes that have half of them each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
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


def thin(module: Any) -> None:
    """Slices of three columns."""
    module._LOGITS, module._THINNEST = 1, 3


def on_two_ranks(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes gets for its half, in slices of three columns."""
    torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    thin(slices)
    half = slice(rank * N, (rank + 1) * N)
    vision, language, scale = features()
    own = [part.clone().requires_grad_() for part in (vision[half], language[half], scale)]
    loss = contrastive_loss(*own)
    loss.backward()
    whole = batch()
    part = replace(whole, **{name: tensor[half] for name, tensor in vars(whole).items()})
    share, grads = gradients(retrieval_model(), part, {"pairs": 2 * N})
    try:
        contrastive_loss(vision[: N - rank], language[: N - rank], scale)
        said = ""
    except ShapeError as error:
        said = str(error)
    names = ("vision", "language", "scale")
    result = {name: tensor.grad for name, tensor in zip(names, own, strict=True)}
    result |= {"loss": loss.detach(), "share": share, "grads": grads, "uneven": said}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
