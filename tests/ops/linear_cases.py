"""Inputs for the tests of expert_linear, and what plain PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from op_cases import DTYPES, TARGETS, Rotation, lay, values
from torch import Tensor

from beit3_fast.ops import Norm, expert_linear

SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "one row": ((0, 1), 64, 64),
    "no rows": ((0, 0), 64, 32),
    "no rows, two experts": ((0, 0, 0), 24, 40),
    "first expert empty": ((0, 0, 7), 64, 96),
    "last expert empty": ((0, 7, 7), 96, 64),
    "middle expert empty": ((0, 5, 5, 12), 48, 48),
    "three experts": ((0, 3, 10, 31), 72, 40),
    "primes": ((0, 59, 113), 61, 53),
    "odd": ((0, 5, 12), 35, 33),
    "197 and 19": ((0, 197, 216), 64, 192),
    "577": ((0, 577), 32, 48),
    "64 and 197": ((0, 64, 261), 88, 88),
    "one feature": ((0, 3, 5), 1, 1),
    "deep": ((0, 2, 9), 770, 24),
    "as deep as fc2": ((0, 5, 9), 3072, 16),
    "wide": ((0, 4, 9), 24, 771),
    "tile edges": ((0, 15, 31, 64), 100, 50),
}


class LinearCase(NamedTuple):
    """One call of expert_linear."""

    impl: str
    dtype: str
    shape: str
    inputs: str
    layout: str
    bias: bool
    norm: bool
    gelu: bool
    residual: bool
    rows: bool
    stacked: bool
    grad_mode: bool

    @property
    def name(self) -> str:
        flags = ("bias", "norm", "gelu", "residual", "rows", "stacked", "grad_mode")
        on = "+".join(flag for flag in flags if getattr(self, flag))
        return f"{self.impl}-{self.dtype}-{self.shape}-{self.inputs}-{self.layout}-{on}"


LINEAR_FACTORS: dict[str, Sequence[Any]] = {
    "inputs": ("normal", "small", "large", "mean", "outliers", "constant"),
    "layout": ("contiguous", "sliced", "every second row", "transposed"),
    "bias": (True, False),
    "norm": (True, False),
    "gelu": (True, False),
    "residual": (True, False),
    "rows": (True, False),
    "stacked": (True, False),
    "grad_mode": (True, False),
}


def linear_cases(repeats: int, targets: Sequence[tuple[str, str]] = TARGETS) -> list[LinearCase]:
    """``repeats`` cases for each shape and target, the other factors in rotation."""
    rotation = Rotation()
    return [
        LinearCase(impl, dtype, shape, **rotation.next((impl, dtype), LINEAR_FACTORS))
        for _, shape, (impl, dtype) in product(range(repeats), SHAPES, targets)
    ]


class LinearOperands(NamedTuple):
    """Tensors of one call, in the dtype of the case."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor] | None
    norm: Norm | None
    residual: Tensor | None
    rows: Tensor | None
    bounds: tuple[int, ...]

    def leaves(self) -> dict[str, Tensor]:
        """Every floating-point tensor by name."""
        named = {"x": self.x}
        named |= {f"weights[{e}]": w for e, w in enumerate(self.weights)}
        named |= {f"biases[{e}]": b for e, b in enumerate(self.biases or ())}
        if self.norm is not None:
            named |= {f"norm.weights[{e}]": g for e, g in enumerate(self.norm.weights)}
            named |= {f"norm.biases[{e}]": b for e, b in enumerate(self.norm.biases)}
        if self.residual is not None:
            named["residual"] = self.residual
        return named

    def in_order(self, columns: Tensor) -> LinearOperands:
        """The same call with the columns of x in another order."""
        norm = self.norm and Norm(
            [g[columns] for g in self.norm.weights],
            [b[columns] for b in self.norm.biases],
            self.norm.eps,
        )
        weights = [w[:, columns] for w in self.weights]
        return self._replace(x=self.x[:, columns], weights=weights, norm=norm)

    def on(self, device: str) -> LinearOperands:
        """The same call on a device."""
        rows = None if self.rows is None else self.rows.to(device)
        return self.map(lambda t: t.to(device))._replace(rows=rows)

    def map(self, change: Any) -> LinearOperands:
        """The same call with every floating-point tensor changed."""
        return self._replace(
            x=change(self.x),
            weights=[change(w) for w in self.weights],
            biases=None if self.biases is None else [change(b) for b in self.biases],
            norm=None
            if self.norm is None
            else Norm(
                [change(g) for g in self.norm.weights],
                [change(b) for b in self.norm.biases],
                self.norm.eps,
            ),
            residual=None if self.residual is None else change(self.residual),
        )


def linear_operands(case: LinearCase, draw: int = 0) -> LinearOperands:
    """Rounded operands; the same ones for the same draw of a case."""
    dtype = DTYPES[case.dtype]
    bounds, inner, out = SHAPES[case.shape]
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)) + draw)
    count, experts = bounds[-1], len(bounds) - 1
    total, rows = count, None
    if case.rows:
        total = count + 3
        rows = torch.randperm(total, generator=generator)[:count]

    def rounded(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale + shift).to(dtype)

    x = values(case.inputs, total, inner, generator).to(dtype)
    norm = None
    if case.norm:
        gammas = [rounded(inner, scale=0.5, shift=1.0) for _ in range(experts)]
        eps = (1e-5, 1e-2)[generator.initial_seed() % 2]
        norm = Norm(gammas, [rounded(inner, scale=0.5) for _ in range(experts)], eps)
    return LinearOperands(
        x=lay(x, case.layout),
        weights=[rounded(out, inner, scale=inner**-0.5) for _ in range(experts)],
        biases=[rounded(out) for _ in range(experts)] if case.bias else None,
        norm=norm,
        residual=lay(rounded(total, out), case.layout) if case.residual else None,
        rows=rows,
        bounds=bounds,
    )


def stacks(parts: list[Tensor], stacked: bool) -> list[Any]:
    """Each weight or bias whole, or as a tuple of pieces along O as query, key and value are."""
    return [tuple(part.tensor_split(3)) if stacked else part for part in parts]


def plain_linear(operands: LinearOperands, gelu: bool) -> Tensor:
    """expert_linear as a few lines of ordinary PyTorch in the operands' own dtype."""
    x, weights, biases, norm, residual, rows, bounds = operands
    index = torch.arange(x.shape[0]) if rows is None else rows
    y = x.new_zeros(x.shape[0], weights[0].shape[0])
    for expert, weight in enumerate(weights):
        own = index[bounds[expert] : bounds[expert + 1]]
        h = x[own]
        if norm is not None:
            gamma, beta = norm.weights[expert], norm.biases[expert]
            h = F.layer_norm(h, (x.shape[1],), gamma, beta, norm.eps)
        h = F.linear(h, weight, None if biases is None else biases[expert])
        if gelu:
            h = F.gelu(h)
        if residual is not None:
            h = residual[own] + h
        y = y.index_copy(0, own, h)
    return y


def run_linear(operands: LinearOperands, case: LinearCase, impl: str) -> Tensor:
    """The op on the operands of a case."""
    x, weights, biases, norm, residual, rows, bounds = operands
    return expert_linear(
        x,
        stacks(weights, case.stacked),
        None if biases is None else stacks(biases, case.stacked),
        bounds=bounds,
        norm=norm,
        activation="gelu" if case.gelu else None,
        residual=residual,
        rows=rows,
        impl=impl,
    )
