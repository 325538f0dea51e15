"""expert_linear: every implementation against the formula in fp64, by the one parity rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_cases import (
    LINEAR_FACTORS,
    SHAPES,
    LinearCase,
    LinearOperands,
    linear_cases,
    linear_operands,
    plain_linear,
    run_linear,
)
from op_cases import DTYPES, IMPLS, TARGETS, assert_near, need
from torch import Tensor

from beit3_fast.errors import ShapeError
from beit3_fast.ops import Measured, Norm, expert_linear
from beit3_fast.parity import op_parity

GRADIENT_TARGETS = [target for target in TARGETS if target[0] != "reference"]
CASES = linear_cases(repeats=1)
GRADIENT_CASES = [
    case for case in linear_cases(repeats=1, targets=GRADIENT_TARGETS) if SHAPES[case.shape][0][-1]
]
LONG_CASES = linear_cases(repeats=9)[len(CASES) :]


def truth_of(operands: LinearOperands, case: LinearCase) -> Tensor:
    return run_linear(operands.map(Tensor.double), case, "reference")


def check_forward(case: LinearCase) -> None:
    need(case.impl)
    operands = linear_operands(case)
    with torch.set_grad_enabled(case.grad_mode):
        ours = run_linear(operands, case, case.impl)
        plain = plain_linear(operands, case.gelu)
    assert_near(op_parity(ours, plain, truth_of(operands, case)), case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(case: LinearCase) -> None:
    check_forward(case)


@pytest.mark.full
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_forward_long(case: LinearCase) -> None:
    check_forward(case)


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case.name)
def test_gradients(case: LinearCase) -> None:
    need(case.impl)
    operands = linear_operands(case)
    seed = torch.randn(operands.x.shape[0], SHAPES[case.shape][2]).to(DTYPES[case.dtype])

    def gradients(change: Any, call: Any) -> dict[str, Tensor | None]:
        own = operands.map(lambda t: change(t).detach().requires_grad_())
        y = call(own)
        y.backward(seed.to(y.dtype))
        return {name: leaf.grad for name, leaf in own.leaves().items()}

    ours = gradients(lambda t: t, lambda own: run_linear(own, case, case.impl))
    plains = [
        gradients(lambda t: t, lambda own, by=by: plain_linear(own.in_order(by), case.gelu))
        for by in orders(SHAPES[case.shape][1], case.dtype)
    ]
    truth = gradients(Tensor.double, lambda own: run_linear(own, case, "reference"))
    bounds = operands.bounds
    for name, expected in truth.items():
        if expected is None:
            expert = int(name.split("[")[1].rstrip("]"))
            assert bounds[expert] == bounds[expert + 1], f"{name} lost its gradient"
            assert ours[name] is None
            continue
        assert ours[name] is not None, name
        worst = max(plains, key=lambda own: float((own[name].double() - expected).abs().max()))
        parity = op_parity(ours[name], worst[name], expected, gradient=True)
        assert_near(parity, f"gradient of {name}")


def orders(columns: int, dtype: str) -> list[Tensor]:
    """Orders of the sums of plain PyTorch. In fp32 the largest error of a gradient is often that of one sum, which nearly cancels
    where GELU bends: the luck of an order decides it."""
    count = 4 if dtype == "fp32" else 1
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(columns, generator=generator) for _ in range(count - 1)]
    return [torch.arange(columns), *drawn]


def test_every_factor_meets_every_implementation() -> None:
    for factor, values in LINEAR_FACTORS.items():
        for value in values:
            for target in TARGETS:
                assert any(
                    (case.impl, case.dtype) == target and getattr(case, factor) == value
                    for case in CASES
                ), (factor, value, target)


def by_hand(
    x: list[float],
    weight: list[list[float]],
    bias: list[float],
    gamma: list[float],
    beta: list[float],
    eps: float,
) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    normed = [
        (value - mean) / math.sqrt(variance + eps) * g + b
        for value, g, b in zip(x, gamma, beta, strict=True)
    ]
    products = [
        sum(n * w for n, w in zip(normed, row, strict=True)) + b
        for row, b in zip(weight, bias, strict=True)
    ]
    return [z * 0.5 * (1 + math.erf(z / math.sqrt(2))) for z in products]


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_the_formula_itself(eps: float) -> None:
    """The truth of all other tests against arithmetic without PyTorch."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, residual = draw(5, 6) * 0.05, draw(5, 4)
    weights, biases = [draw(4, 6), draw(4, 6)], [draw(4), draw(4)]
    norm = Norm([draw(6), draw(6)], [draw(6), draw(6)], eps)
    rows = torch.tensor([4, 0, 2])
    y = expert_linear(
        x,
        weights,
        biases,
        bounds=(0, 1, 3),
        norm=norm,
        activation="gelu",
        residual=residual,
        rows=rows,
        impl="reference",
    )
    for place, row in enumerate(rows.tolist()):
        e = 0 if place < 1 else 1
        operands = (weights[e], biases[e], norm.weights[e], norm.biases[e])
        expected = by_hand(x[row].tolist(), *(t.tolist() for t in operands), eps)
        expected = [a + b for a, b in zip(expected, residual[row].tolist(), strict=True)]
        assert y[row].tolist() == pytest.approx(expected, rel=1e-12)
    assert y[[1, 3]].abs().max() == 0


@pytest.mark.parametrize("impl", ["reference", "composite"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("rows", [True, False])
def test_gradcheck(impl: str, norm: bool, gelu: bool, rows: bool) -> None:
    case = LinearCase(
        impl, "fp32", "odd", "normal", "contiguous", True, norm, gelu, True, rows, False, True
    )
    small = linear_operands(case)._replace(bounds=(0, 1, 3))
    keep = torch.tensor([2, 0, 4]) if rows else None
    count = 5 if rows else 3
    small = small._replace(rows=keep, x=small.x[:count, :4], residual=small.residual[:count, :3])
    small = small._replace(
        weights=[w[:3, :4] for w in small.weights], biases=[b[:3] for b in small.biases or ()]
    )
    if small.norm is not None:
        cut = [[t[:4] for t in group] for group in small.norm[:2]]
        small = small._replace(norm=Norm(cut[0], cut[1], 1e-5))
    small = small.map(lambda t: t.double().detach().requires_grad_())
    leaves = list(small.leaves().values())

    def call(*tensors: Tensor) -> Tensor:
        feed = iter(tensors)
        order = iter([next(feed) for _ in leaves])
        filled = LinearOperands(
            x=next(order),
            weights=[next(order) for _ in small.weights],
            biases=[next(order) for _ in small.biases or ()],
            norm=None
            if small.norm is None
            else Norm([next(order), next(order)], [next(order), next(order)], 1e-5),
            residual=next(order),
            rows=small.rows,
            bounds=small.bounds,
        )
        return run_linear(filled, case, impl)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_are_not_named_are_zero(impl: str) -> None:
    need(impl)
    x, weight = torch.randn(6, 8), torch.randn(5, 8)
    rows = torch.tensor([4, 1])
    y = expert_linear(
        x, [weight], bounds=(0, 2), residual=torch.full((6, 5), 7.0), rows=rows, impl=impl
    )
    assert y[[0, 2, 3, 5]].abs().max() == 0
    torch.testing.assert_close(y[rows], x[rows] @ weight.T + 7.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_gathered_rows_give_the_packed_result(impl: str) -> None:
    need(impl)
    x, residual = torch.randn(12, 16), torch.randn(12, 24)
    weights = [torch.randn(24, 16), torch.randn(24, 16)]
    norm = Norm([torch.randn(16)] * 2, [torch.randn(16)] * 2)
    order = torch.randperm(12)
    packed = expert_linear(
        x[order], weights, bounds=(0, 5, 12), norm=norm, residual=residual[order], impl=impl
    )
    gathered = expert_linear(
        x, weights, bounds=(0, 5, 12), norm=norm, residual=residual, rows=order, impl=impl
    )
    torch.testing.assert_close(gathered[order], packed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_experts_without_rows_change_nothing(impl: str) -> None:
    need(impl)
    x, residual = torch.randn(9, 16), torch.randn(9, 24)
    weights, biases = list(torch.randn(4, 24, 16)), list(torch.randn(4, 24))
    gammas, betas = list(torch.randn(4, 16)), list(torch.randn(4, 16))

    def call(experts: slice, bounds: tuple[int, ...]) -> Tensor:
        return expert_linear(
            x,
            weights[experts],
            biases[experts],
            bounds=bounds,
            norm=Norm(gammas[experts], betas[experts], 0.1),
            activation="gelu",
            residual=residual,
            impl=impl,
        )

    used = call(slice(1, 4, 2), (0, 5, 9))
    assert torch.equal(call(slice(4), (0, 0, 5, 5, 9)), used)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("operand", ["weight", "residual", "x", "bias", "norm", "rows"])
def test_operands_in_any_memory_order(impl: str, operand: str) -> None:
    """A tensor whose last dimension is not contiguous gives the result of a contiguous one."""
    need(impl)
    x, weight, residual = torch.randn(9, 16), torch.randn(24, 16), torch.randn(9, 24)
    bias, gamma, beta = torch.randn(24), torch.randn(16), torch.randn(16)

    def call(
        x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor, gamma: Tensor, rows: Tensor
    ) -> Tensor:
        operands: dict[str, Any] = {
            "norm": Norm([gamma], [beta]),
            "residual": residual,
            "rows": rows,
        }
        return expert_linear(x, [weight], [bias], bounds=(0, 9), **operands, impl=impl)

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, t], dim=-1)[..., 0]

    rows = torch.randperm(9)
    expected = call(x, weight, residual, bias, gamma, rows)
    parts = {"x": x, "weight": weight, "residual": residual, "bias": bias, "norm": gamma}
    parts["rows"] = rows
    parts[operand] = strided(parts[operand])
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            ours = call(*parts.values())
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_that_is_not_finite_stays_alone(impl: str, dtype: str) -> None:
    need(impl)
    x = torch.randn(40, 48).to(DTYPES[dtype])
    weights = [torch.randn(24, 48).to(DTYPES[dtype]) for _ in range(2)]
    norm = Norm([torch.ones(48).to(DTYPES[dtype])] * 2, [torch.zeros(48).to(DTYPES[dtype])] * 2)

    def call(x: Tensor) -> Tensor:
        return expert_linear(
            x, weights, bounds=(0, 17, 40), norm=norm, activation="gelu", impl=impl
        )

    with torch.no_grad():
        clean = call(x)
        for poison in (math.nan, math.inf):
            spoiled = x.clone()
            spoiled[20, 3] = poison
            y = call(spoiled)
            others = torch.arange(40) != 20
            assert torch.equal(y[others], clean[others])
            assert bool(y[20].isnan().all())


@pytest.mark.parametrize("impl", IMPLS)
def test_memory_is_poisoned_here(impl: str) -> None:
    assert bool(torch.empty(64).isnan().all())


@pytest.mark.parametrize("impl", ["composite", "cpu"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_uninitialised_memory_holds_changes_nothing(impl: str, dtype: str) -> None:
    need(impl)
    case = LinearCase(
        impl, dtype, "primes", "normal", "sliced", True, True, True, True, True, True, False
    )
    operands = linear_operands(case)
    with torch.no_grad():
        poisoned = run_linear(operands, case, impl)
        torch.utils.deterministic.fill_uninitialized_memory = False
        assert torch.equal(run_linear(operands, case, impl), poisoned)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_operands_are_only_read(impl: str) -> None:
    need(impl)
    case = LinearCase(
        impl,
        "fp32",
        "three experts",
        "normal",
        "contiguous",
        True,
        True,
        True,
        True,
        True,
        False,
        False,
    )
    operands = linear_operands(case)
    before = {name: leaf.clone() for name, leaf in operands.leaves().items()}
    with torch.no_grad():
        run_linear(operands, case, impl)
    for name, leaf in operands.leaves().items():
        assert torch.equal(leaf, before[name]), name


def test_selected_rows_keep_their_statistics() -> None:
    rows = torch.tensor([3, 0])
    x = Measured(torch.randn(4, 6), torch.randn(4, 2, 2), 3)
    chosen = x.select(rows)
    assert torch.equal(chosen.rows, x.rows[rows])
    assert chosen.parts is not None
    assert x.parts is not None
    assert torch.equal(chosen.parts, x.parts[rows])
    assert chosen.width == 3
    assert Measured(x.rows).select(rows).parts is None


@pytest.mark.parametrize(
    ("shape", "width", "dtype"),
    [
        ((4, 3, 2), 3, torch.float32),
        ((3, 2, 2), 3, torch.float32),
        ((4, 2, 2), 3, torch.float64),
        ((4, 6, 2), 0, torch.float32),
    ],
)
def test_statistics_that_do_not_fit_are_refused(
    shape: tuple[int, ...], width: int, dtype: torch.dtype
) -> None:
    x = Measured(torch.randn(4, 6), torch.randn(shape, dtype=dtype), width)
    with pytest.raises(ShapeError, match="statistics of x"):
        expert_linear(x, [torch.randn(5, 6)], bounds=(0, 4))
