"""The gradients of expert_linear in Triton: against the formula in fp64, cut into parts, and by descriptors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from beit3_fast.kernels.expert_linear import Tile
from linear_cases import (
    SHAPES,
    LinearCase,
    LinearOperands,
    linear_cases,
    linear_operands,
    plain_linear,
    run_linear,
)
from op_cases import DTYPES, Results, assert_draws_near, draws_of
from torch import Tensor
from triton_cases import DEVICE, TARGETS, one_target_each

from beit3_fast.kernels import _weight_gradient as weight_kernels
from beit3_fast.ops import Norm, expert_linear, triton_kernels

IN_THE_GATE = {
    "one row",
    "last expert empty",
    "middle expert empty",
    "three experts",
    "primes",
    "odd",
    "one feature",
    "tile edges",
}
ALL_CASES = [case for case in linear_cases(3, TARGETS) if SHAPES[case.shape][0][-1]]
CASES = [case for case in one_target_each(ALL_CASES) if case.shape in IN_THE_GATE][:8]
LONG_CASES = [case for case in ALL_CASES if case not in CASES]
Leaves = dict[str, Tensor | None]


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few rows, so that small experts have several."""
    monkeypatch.setattr(weight_kernels, "_SHORTEST_PART", 16)
    monkeypatch.setattr(weight_kernels, "_multiprocessors", lambda device: 64)
    choose = weight_kernels._tiles.choose
    monkeypatch.setattr(
        weight_kernels._tiles, "choose", lambda *key: choose(*key)._replace(block_k=16)
    )


def gradients(
    operands: LinearOperands, dtype: str, call: Callable[[LinearOperands], Tensor]
) -> Leaves:
    """Of every tensor of a call by name; the upstream gradient, rounded to a dtype, is the same for all."""
    own = operands.map(lambda t: t.detach().requires_grad_())
    y = call(own)
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(y.shape, generator=generator).to(DTYPES[dtype])
    y.backward(seed.to(y))
    return {name: None if t.grad is None else t.grad.cpu() for name, t in own.leaves().items()}


def check(case: LinearCase, request: pytest.FixtureRequest) -> None:
    # Of large numbers only a handful is where GELU bends. How they are rounded is then the verdict: that of the steps
    # along the depth that are shipped, not of short ones.
    if case.inputs != "large" or not case.gelu:
        request.getfixturevalue("short_parts")
    draws = draws_of(SHAPES[case.shape][0][-1])
    assert_draws_near([results(linear_operands(case, draw), case) for draw in draws], case.name)


def results(operands: LinearOperands, case: LinearCase) -> dict[str, Results]:
    ours = gradients(operands.on(DEVICE), case.dtype, lambda own: run_linear(own, case, "triton"))
    plain = gradients(operands, case.dtype, lambda own: plain_linear(own, case.gelu))
    truth = gradients(
        operands.map(Tensor.double), case.dtype, lambda own: run_linear(own, case, "reference")
    )
    found = {}
    for name, expected in truth.items():
        mine, theirs = ours[name], plain[name]
        if expected is None:
            assert mine is None, name
            continue
        assert mine is not None, name
        assert theirs is not None, name
        found[name] = Results(mine, theirs, expected)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case: LinearCase, request: pytest.FixtureRequest) -> None:
    check(case, request)


@pytest.mark.full
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_gradients_long(case: LinearCase, request: pytest.FixtureRequest) -> None:
    check(case, request)


def draw(*shape: int, dtype: str = "fp32") -> Tensor:
    return torch.randn(*shape).to(DTYPES[dtype]).to(DEVICE)


@pytest.mark.parametrize(
    ("dtype", "tma", "slices"),
    [
        ("fp16", True, 4),
        ("fp16", False, 2),
        pytest.param("fp32", False, 1, marks=pytest.mark.full),
    ],
)
def test_parts_hold_the_rows_of_one_expert_each(
    dtype: str, tma: bool, slices: int, short_parts: None
) -> None:
    """Five experts, more than one launch takes; the rows of a part end within a step, too."""
    bounds = (0, 33, 33, 50, 51, 83)
    dz, operand = draw(83, 40, dtype=dtype), draw(83, 24, dtype=dtype)
    for place in range(0, 83, 7):
        operand[place] *= 100.0
    tile = Tile(32, 16, 16, 1, 4, 2, slices=slices, tma=tma)
    parts, places = weight_kernels.weight_gradient(dz, operand, bounds, tile)
    assert [b - a for a, b in pairwise(places)] == [3, 0, 2, 1, 2]
    rows = [r for a, b in pairwise(bounds) for r in pairwise([*range(a, b, 16), b])]
    assert len(rows) == len(parts)
    for part, (a, b) in zip(parts, rows, strict=True):
        expected = dz[a:b].double().T @ operand[a:b].double()
        torch.testing.assert_close(part.double(), expected, rtol=1e-4, atol=1e-3)


def test_rows_that_are_not_named_neither_give_nor_get() -> None:
    x, weight, residual = draw(9, 16), draw(8, 16), draw(9, 8)
    rows = torch.tensor([7, 2, 3], device=DEVICE)

    def found(x: Tensor, seed: Tensor) -> list[Tensor]:
        own = [t.detach().requires_grad_() for t in (x, weight, residual)]
        norm = Norm([torch.ones_like(x[0])], [torch.zeros_like(x[0])])
        y = expert_linear(
            own[0],
            [own[1]],
            bounds=(0, 3),
            norm=norm,
            activation="gelu",
            residual=own[2],
            rows=rows,
            impl="triton",
        )
        return list(torch.autograd.grad(y, own, seed))

    seed = draw(9, 8)
    others = torch.ones(9, dtype=torch.bool, device=DEVICE).index_fill(0, rows, False)
    clean = found(x, seed)
    spoiled = found(
        x.masked_fill(others[:, None], torch.nan), seed.masked_fill(others[:, None], torch.nan)
    )
    for ours, expected in zip(spoiled, clean, strict=True):
        assert torch.equal(ours, expected)
    assert not clean[0][others].any()
    assert not clean[2][others].any()


def test_what_the_forward_pass_keeps() -> None:
    """The pre-activation for GELU, else nothing; and a gradient without it is refused, not wrong."""
    x, weight, bias = draw(5, 16), draw(24, 16), draw(24)

    def call(x: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
        """The result, and what is kept."""
        lists: tuple[list[Tensor], ...] = ([weight], [], [bias], [], [])
        rest: tuple[Any, ...] = (None, None, [0, 5], 0.0, activation, keep, False)
        y, z, left = triton_kernels.expert_linear(x, None, 0, *lists, *rest)
        assert not left.numel()
        return y, z

    _, z = call(x, "gelu", True)
    torch.testing.assert_close(z, x @ weight.T + bias, rtol=1e-5, atol=1e-5)
    assert not call(x, "none", True)[1].numel()
    assert not call(x, "gelu", False)[1].numel()
    y, _ = call(x.requires_grad_(), "gelu", False)
    with pytest.raises(RuntimeError, match="keep=True"):
        y.sum().backward()


@pytest.mark.parametrize("across", [0, 1])
def test_a_gradient_that_is_one_row_or_one_number_of_each(across: int) -> None:
    """As it comes from behind a sum: its strides are zero."""
    x, weight = draw(7, 16).requires_grad_(), draw(24, 16).requires_grad_()
    factors = draw(24 if across == 0 else 7)

    def found(impl: str) -> list[Tensor]:
        y = expert_linear(x, [weight], bounds=(0, 7), impl=impl)
        return list(torch.autograd.grad((y.sum(across) * factors).sum(), [x, weight]))

    for ours, expected in zip(found("triton"), found("reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
