"""Inputs for the op tests: hard values, hard layouts, and what plain PyTorch makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.ops import library
from beit3_fast.parity import Parity, op_parity

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = [
    ("reference", "fp32"),
    ("reference", "bf16"),
    ("reference", "fp16"),
    ("composite", "fp32"),
    ("composite", "bf16"),
    ("composite", "fp16"),
    ("cpu", "fp32"),
    ("cpu", "bf16"),
]
IMPLS = ("reference", "composite", "cpu")


def need(impl: str) -> None:
    """Skip with the reason where an implementation cannot run."""
    if impl == "cpu" and not library.available():
        pytest.skip(f"cpu: the library {library.why_unavailable()}")


class Rotation:
    """Deals the values of each factor from a shuffled deck of its own, one deck for each target.

    All values of a factor have come once before one comes again, and no two factors go in step: pairs are met
    soon without the product of all factors.
    """

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.decks: dict[Any, list[Any]] = {}

    def next(self, target: Any, factors: dict[str, Sequence[Any]]) -> dict[str, Any]:
        return {name: self.deal((target, name), values) for name, values in factors.items()}

    def deal(self, deck: Any, values: Sequence[Any]) -> Any:
        if not self.decks.get(deck):
            order = torch.randperm(len(values), generator=self.generator).tolist()
            self.decks[deck] = [values[i] for i in order]
        return self.decks[deck].pop()


def values(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """fp32 [rows, columns] of one kind; never only N(0, 1)."""
    x = torch.randn(rows, columns, generator=generator)
    if kind == "normal":
        return x
    if kind == "small":
        return x * 1e-3
    if kind == "large":
        return x * 100.0
    if kind == "mean":
        return x + 50.0
    if kind == "outliers":
        for column in range(0, columns, max(columns // 3, 1)):
            x[:, column] *= 10.0 ** (3 + column % 2)
        return x
    if kind == "constant":
        # Exact in every dtype, so that every mean is too: what is left is the variance of zero.
        constant = torch.randint(-64, 64, (rows, 1), generator=generator) / 8.0
        return constant.expand(rows, columns).clone()
    raise ValueError(kind)


def lay(x: Tensor, layout: str) -> Tensor:
    """The same values as ``x`` [M, C] in other memory."""
    rows, columns = x.shape
    if layout == "contiguous":
        return x
    if layout == "sliced":
        wide = torch.full((rows, columns + 13), float("nan"), dtype=x.dtype)
        wide[:, 5 : 5 + columns] = x
        return wide[:, 5 : 5 + columns]
    if layout == "every second row":
        tall = torch.full((2 * rows, columns), float("nan"), dtype=x.dtype)
        tall[::2] = x
        return tall[::2]
    if layout == "transposed":
        return x.T.contiguous().T
    raise ValueError(layout)


def assert_near(parity: Parity, what: object) -> None:
    """Fail with the figures where the parity rule is broken."""
    assert parity.passed, f"{what}: {parity.reason}"


class Results(NamedTuple):
    """What one tensor came out as: of the implementation, of plain PyTorch, and in fp64."""

    ours: Tensor
    plain: Tensor
    truth: Tensor


def draws_of(fewest: int) -> range:
    """How often a call is drawn whose results have at least so many numbers: until there are 32.

    The largest error of a few is luck, plain PyTorch's as well as ours.
    """
    return range(1 if fewest >= 16 or not fewest else math.ceil(32 / fewest))


def assert_draws_near(draws: Sequence[Mapping[str, Results]], what: str) -> None:
    """Judge the losses and gradients of several draws of a call as if they were one."""
    for name in {name: None for own in draws for name in own}:
        drawn = zip(*(own[name] for own in draws if name in own), strict=True)
        ours, plain, truth = (
            torch.cat([t[None] if t.ndim == 1 else t for t in parts]) for parts in drawn
        )
        parity = op_parity(ours, plain, truth, gradient=name != "losses")
        assert_near(parity, f"{name} of {what}")


def plain_best(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    count: int,
    allowed: Tensor | None,
    lower_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """The highest log probabilities of a linear head, and their classes, by PyTorch's own calls; of equals the lower one, or
    what topk takes."""
    log_p = F.linear(x, weight, bias).float().log_softmax(-1)
    if allowed is not None:
        log_p = log_p.masked_fill(~allowed, float("-inf"))
    if not lower_first:
        return log_p.topk(count, dim=-1)
    best, ids = log_p.sort(dim=-1, descending=True, stable=True)
    return best[:, :count], ids[:, :count]
