"""A codebook on the unit sphere that follows what it is shown: the quantiser of BEiT v2's tokenizer.

Codes are moving averages of the rows that chose them, the first ones found by k-means (arXiv 2208.06366, section 2.2). A
code that nothing chooses any more begins again at a row of the batch, which the published training does without. Names and
shapes of the buffers are the published ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.errors import ShapeError

_ITERATIONS = 10
# Similarities that exist at a time: 64 MiB.
_SIMILARITIES = 1 << 24


class Quantized(NamedTuple):
    """``rows`` [R, D]: the nearest codes, with the gradient of what they stand for; ``codes`` int64 [R]; ``loss``: the
    mean squared distance between them, which draws the rows to their codes."""

    rows: Tensor
    codes: Tensor
    loss: Tensor


class _Embedding(nn.Module):
    """``cluster_size`` (of the first codes) and ``embed_avg`` are in published files and are not read."""

    weight: Tensor
    cluster_size: Tensor
    initted: Tensor

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_codes, code_dim))
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("embed_avg", torch.zeros(num_codes, code_dim))
        self.register_buffer("initted", torch.zeros(1))


class Codebook(nn.Module):
    """``decay`` of the averages, and ``revive_below``: a code is dead whose share of the rows is below this part of the
    mean share. All state is in the state dict; random choices are PyTorch's."""

    cluster_size: Tensor

    def __init__(
        self, num_codes: int, code_dim: int, decay: float = 0.99, revive_below: float = 0.01
    ) -> None:
        super().__init__()
        self.decay, self.revive_below = decay, revive_below
        self.embedding = _Embedding(num_codes, code_dim)
        self.register_buffer("cluster_size", torch.zeros(num_codes))

    @property
    def num_codes(self) -> int:
        """Codes in all."""
        return len(self.embedding.weight)

    def nearest(self, rows: Tensor) -> Tensor:
        """The codes int64 [R] of rows [R, D] of any length. Raises ShapeError for rows of another width."""
        return _nearest(self._unit(rows, 0), self.embedding.weight)

    def forward(self, rows: Tensor) -> Quantized:
        """Quantise rows [R, D] of any length, in the codes' dtype; in training mode the codes then follow them.

        The first rows that it is shown in training place the codes. Under torch.distributed all processes keep one codebook,
        that of the rows of all. Rows that are not finite teach nothing. Raises ShapeError for
        rows of another width, or none.
        """
        z = self._unit(rows, 1)
        if self.training and not bool(self.embedding.initted):
            self._begin(z.detach())
        codes = _nearest(z.detach(), self.embedding.weight)
        chosen = F.embedding(codes, self.embedding.weight)
        if self.training:
            self._follow(z.detach(), codes)
        loss = F.mse_loss(z, chosen)
        return Quantized(z + (chosen - z).detach(), codes, loss)

    def _unit(self, rows: Tensor, least: int) -> Tensor:
        own = self.embedding.weight
        if rows.dim() != 2 or rows.shape[1] != own.shape[1] or len(rows) < least:
            raise ShapeError(
                f"rows must be [R, {own.shape[1]}] with R of at least {least}, got {list(rows.shape)}; code_dim must be the "
                "width of the encoder's rows"
            )
        return F.normalize(rows.to(own.dtype), dim=1)

    @torch.no_grad()
    def _begin(self, z: Tensor) -> None:
        own = self.embedding
        z = z[z.isfinite().all(1)]
        if _distributed():
            z = torch.cat(_gathered(z))
        if not len(z):
            return
        codes, sizes = _kmeans(z, self.num_codes)
        _agree(codes, sizes)
        own.weight.copy_(codes)
        own.cluster_size.copy_(sizes)
        self.cluster_size.copy_(sizes)
        own.initted.fill_(1.0)

    @torch.no_grad()
    def _follow(self, z: Tensor, codes: Tensor) -> None:
        own = self.embedding
        good = z.isfinite().all(1, keepdim=True)
        # One tensor, and so one collective: the sums of the rows and their number.
        shown = torch.cat([z.where(good, 0.0), good.to(z.dtype)], dim=1)
        sums = z.new_zeros(self.num_codes, z.shape[1] + 1).index_add_(0, codes, shown)
        if _distributed():
            dist.all_reduce(sums)
        means, counts = F.normalize(sums[:, :-1], dim=1), sums[:, -1]
        moved = F.normalize(own.weight.lerp(means, 1 - self.decay), dim=1)
        own.weight.copy_(moved.where(counts[:, None] > 0, own.weight))
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self._revive(z, good[:, 0])
        _agree(own.weight, self.cluster_size)

    def _revive(self, z: Tensor, good: Tensor) -> None:
        mean = self.cluster_size.mean()
        place = _places(len(z), self.num_codes, z.device)
        dead = (self.cluster_size < self.revive_below * mean) & good[place]
        self.embedding.weight.copy_(z[place].where(dead[:, None], self.embedding.weight))
        self.cluster_size.copy_(mean.where(dead, self.cluster_size))


def _agree(*tensors: Tensor) -> None:
    """Everybody takes what the first process has: random choices and the last bits of a sum are its own."""
    if _distributed():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def _nearest(z: Tensor, codes: Tensor) -> Tensor:
    """[R] by [R, D] of unit length, never in half precision; ties go to the first code."""
    bias = codes.square().sum(1) / -2
    step = max(1, _SIMILARITIES // len(codes))
    with torch.autocast(z.device.type, enabled=False):
        return torch.cat([F.linear(part, codes, bias).argmax(1) for part in z.split(step)])


def _kmeans(z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Spherical k-means: codes [count, D] and how many rows of z are nearest to each."""
    codes = z[_places(len(z), count, z.device)]
    for _ in range(_ITERATIONS):
        own = _nearest(z, codes)
        sums = torch.zeros_like(codes).index_add_(0, own, z)
        sizes = own.bincount(minlength=count)
        codes = F.normalize(sums, dim=1).where(sizes[:, None] > 0, codes)
    return codes, sizes.to(z.dtype)


def _places(rows: int, count: int, device: torch.device) -> Tensor:
    """``count`` random rows, different ones where there are enough."""
    if rows >= count:
        return torch.randperm(rows, device=device)[:count]
    return torch.randint(rows, (count,), device=device)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gathered(z: Tensor) -> list[Tensor]:
    """The rows of all processes, of which each may have another number."""
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, len(z))
    padded = z.new_zeros(max(counts), z.shape[1])
    padded[: len(z)] = z
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]
