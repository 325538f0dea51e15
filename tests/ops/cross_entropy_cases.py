"""Calls of masked_linear_cross_entropy, and the check of their losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from op_cases import DTYPES, Results, assert_draws_near, draws_of, lay, values
from torch import Tensor

from beit3_fast.ops import masked_linear_cross_entropy

# Rows of x, named rows, features, classes.
SHAPES = {
    "no rows": (5, 0, 8, 11),
    "one row": (1, 1, 16, 40),
    "one class": (6, 4, 8, 1),
    "one feature": (49, 40, 1, 3),
    "primes": (61, 29, 53, 101),
    "all rows": (17, 17, 24, 64),
    "few of many": (300, 13, 32, 517),
    "deep": (12, 7, 770, 33),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "inputs": ("normal", "large", "mean", "outliers", "small"),
    "layout": ("contiguous", "sliced", "every second row", "transposed"),
    "bias": (True, False),
    "smoothing": (0.0, 0.1, 1.0),
    "slices": (1 << 24, 37, 256),
}


class Case(NamedTuple):
    """One call: ``slices`` bounds the logits that exist at a time."""

    impl: str
    dtype: str
    shape: str
    inputs: str
    layout: str
    bias: bool
    smoothing: float
    slices: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


class Operands(NamedTuple):
    """Tensors of one call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    targets: Tensor

    def leaves(self, change: Callable[[Tensor], Tensor] = lambda t: t) -> Operands:
        """The same call on changed floating-point tensors that ask for gradients."""
        x, weight, bias = (
            None if t is None else change(t).detach().requires_grad_() for t in self[:3]
        )
        return Operands(x, weight, bias, *self[3:])  # type: ignore[arg-type]


def draw(
    shape: str,
    dtype: torch.dtype = torch.float32,
    inputs: str = "normal",
    layout: str = "contiguous",
    bias: bool = True,
    turn: int = 0,
) -> Operands:
    total, count, inner, vocabulary = SHAPES[shape]
    generator = torch.Generator().manual_seed(sum(map(ord, shape + inputs)) + turn)
    x = lay(values(inputs, total, inner, generator).to(dtype), layout)
    weight = torch.randn(vocabulary, inner, generator=generator) * inner**-0.5
    offsets = torch.randn(vocabulary, generator=generator).to(dtype)
    rows = torch.randperm(total, generator=generator)[:count]
    targets = torch.randint(vocabulary, (count,), generator=generator)
    return Operands(x, lay(weight.to(dtype), layout), offsets if bias else None, rows, targets)


def operands_of(case: Case, turn: int = 0) -> Operands:
    return draw(case.shape, DTYPES[case.dtype], case.inputs, case.layout, case.bias, turn)


def plain(own: Operands, smoothing: float) -> Tensor:
    """The losses as PyTorch's own calls make them from all logits.

    In fp32 the bias is added to rounded sums, as every GPU library does it. Some CPU libraries start a sum with it: of
    one feature the logit is then rounded once.
    """
    x = own.x[own.rows]
    if x.dtype == torch.float32 and own.bias is not None:
        logits = F.linear(x, own.weight) + own.bias
    else:
        logits = F.linear(x, own.weight, own.bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, own.targets, label_smoothing=smoothing, reduction="none")


def check(case: Case, device: str = "cpu") -> None:
    """Losses and every gradient by the parity rule; rows that are not named get none."""
    _, count, _, classes = SHAPES[case.shape]
    turns = draws_of(min(count, classes))
    assert_draws_near([_results(case, device, turn) for turn in turns], case.name)


def _results(case: Case, device: str, turn: int) -> dict[str, Results]:
    given = operands_of(case, turn)
    seed = torch.randn(len(given.rows))

    def run(own: Operands, losses: Tensor) -> dict[str, Tensor]:
        named = {name: t for name, t in own._asdict().items() if t is not None and t.requires_grad}
        gradients = torch.autograd.grad(losses, [*named.values()], seed.to(losses))
        found = {"losses": losses.detach(), **dict(zip(named, gradients, strict=True))}
        return {name: t.cpu() for name, t in found.items()}

    options: dict[str, Any] = {"label_smoothing": case.smoothing, "reduction": "none"}
    moved = Operands(*(None if t is None else t.to(device) for t in given))
    here, there, exact = moved.leaves(), given.leaves(), given.leaves(Tensor.double)
    ours = run(here, masked_linear_cross_entropy(*here, **options, impl=case.impl))
    theirs = run(there, plain(there, case.smoothing))
    truth = run(exact, masked_linear_cross_entropy(*exact, **options, impl="reference"))
    others = torch.ones(len(given.x), dtype=torch.bool).index_fill(0, given.rows, False)
    assert not ours["x"][others].any()
    return {name: Results(ours[name], theirs[name], expected) for name, expected in truth.items()}
