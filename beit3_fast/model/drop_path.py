"""Drop path (stochastic depth): in train mode a sample leaves a branch of a layer altogether.

A dropped sample's rows are not computed and then multiplied by zero: they are taken out before the branch, whose
products and attention see the packed rows of the other samples only. Draws, scale and result are those of the official
DropPath (each sample by itself, what is kept divided by the probability of keeping it).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_fast.layout import TokenLayout


class _State(threading.local):
    """Of each thread. torch.compile traces this, where a ContextVar would break its graph."""

    def __init__(self) -> None:
        self.off = False


_state = _State()


@contextmanager
def without_drop_path() -> Iterator[None]:
    """Within it models drop nothing, whatever mode they are in: answers do not depend on chance. Changes no module."""
    before, _state.off = _state.off, True
    try:
        yield
    finally:
        _state.off = before


def acts() -> bool:
    """Whether a model in train mode drops anything."""
    return not _state.off


class Kept(NamedTuple):
    """One branch's draw: ``factors`` [B], 0 or 1 / (1 - rate), samples in the caller's order.

    ``samples`` says which factors are not zero, where the host knows them; ``scale`` is what those are.
    """

    factors: Tensor
    samples: tuple[bool, ...] | None = None
    scale: float = 1.0

    def of_rows(self, layout: TokenLayout) -> Tensor:
        """[R, 1]: the factor of every row."""
        return self.factors[layout.sample_of_row, None]

    def add(self, residual: Tensor, y: Tensor, rows: Tensor | None) -> Tensor:
        """residual [R, C] with the scaled branch y [R', C] added to ``rows`` int64 [R'] (None: all)."""
        if rows is None:
            return torch.add(residual, y, alpha=self.scale)
        dtype = torch.promote_types(residual.dtype, y.dtype)
        return residual.to(dtype).index_add(0, rows, y.to(dtype), alpha=self.scale)


Draws = tuple[Kept | None, Kept | None]


def draw(rates: Sequence[float], x: Tensor, layout: TokenLayout, skip: bool) -> list[Draws]:
    """The draws of every layer, attention and feed-forward: None for rate 0.

    All layers are drawn at once, in the order in which they are used, so that the host waits for a GPU once. Without
    ``skip`` the host learns nothing (torch.compile, mask tensors) and factors are to be multiplied with.
    """
    factors = [
        x.new_empty(layout.batch_size, 1, 1).bernoulli_(1.0 - rate).div_(1.0 - rate)[:, 0, 0]
        for rate in rates
        if rate
        for _ in range(2)
    ]
    branches = [Kept(own) for own in factors]
    if skip and branches:
        values = torch.stack(factors).tolist()
        branches = [
            Kept(own, tuple(value > 0 for value in row), max(row, default=1.0))
            for own, row in zip(factors, values, strict=True)
        ]
    drawn = iter(branches)
    return [(next(drawn), next(drawn)) if rate else (None, None) for rate in rates]


def touch(
    x: Tensor,
    uses: Iterable[tuple[nn.Module | None, TokenLayout, TokenLayout]],
    route: Callable[[Any, TokenLayout], Any],
) -> Tensor:
    """x, with a gradient of zeros for the parameters of experts whose rows were all dropped.

    ``uses`` holds modules with their layout before and after dropping. Without it such parameters would have no
    gradient, which optimizers and DistributedDataParallel tell from zeros.
    """
    idle: list[Tensor] = []
    for module, before, after in uses:
        if module is None:
            continue
        owned, left = route(module, before), route(module, after)
        ranges = zip(owned.modules, pairwise(owned.bounds), pairwise(left.bounds), strict=True)
        for expert, (start, stop), (first, last) in ranges:
            if stop > start and first == last:
                idle += [p for p in expert.parameters() if p.requires_grad]
    for parameter in idle:
        x = x + parameter.flatten()[:0].sum().to(x.dtype)
    return x
