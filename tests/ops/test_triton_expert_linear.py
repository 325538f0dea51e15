"""expert_linear in Triton: against the formula in fp64, and what the launch leaves behind for the next op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from beit3_fast.kernels._folded_weights import fold
from linear_cases import (
    SHAPES,
    LinearCase,
    LinearOperands,
    linear_cases,
    linear_operands,
    plain_linear,
    run_linear,
)
from op_cases import DTYPES, assert_near
from torch import Tensor
from triton_cases import DEVICE, TARGETS, moments, one_target_each

from beit3_fast.kernels import expert_linear as kernels
from beit3_fast.ops import Norm, expert_linear
from beit3_fast.parity import op_parity
from beit3_fast.reference.expert_linear import expert_linear as formula

ALL_CASES = linear_cases(6, TARGETS)
CASES = one_target_each(ALL_CASES[: len(SHAPES) * len(TARGETS)])
LONG_CASES = [case for case in ALL_CASES if case not in CASES]
DTYPE_NAMES = [dtype for _, dtype in TARGETS]
EDGES = kernels.Tile(16, 32, 16, 2, 4, 2, slices=2)


@torch.no_grad()
def check_forward(case: LinearCase) -> None:
    operands = linear_operands(case)
    truth = run_linear(operands.map(Tensor.double), case, "reference")
    plain = plain_linear(operands, case.gelu)
    ours = run_linear(operands.on(DEVICE), case, "triton").cpu()
    assert_near(op_parity(ours, plain, truth), case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(case: LinearCase) -> None:
    check_forward(case)


@pytest.mark.full
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_forward_long(case: LinearCase) -> None:
    check_forward(case)


def draw(*shape: int, dtype: str = "fp32") -> Tensor:
    return torch.randn(*shape).to(DTYPES[dtype]).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize(
    ("shape", "with_rows"),
    [
        pytest.param(shape, with_rows, marks=() if with_rows is in_gate else pytest.mark.full)
        for shape, in_gate in (
            ("odd", False),
            ("middle expert empty", True),
            ("one feature", False),
        )
        for with_rows in (False, True)
    ],
)
def test_statistics_are_those_of_the_stored_rows(dtype: str, shape: str, with_rows: bool) -> None:
    bounds, inner, out = SHAPES[shape]
    experts, count = len(bounds) - 1, bounds[-1]
    rows = torch.randperm(count + 2, device=DEVICE)[:count] if with_rows else None
    x = draw(count + 2 * with_rows, inner, dtype=dtype)
    weights = [draw(out, inner, dtype=dtype) for _ in range(experts)]
    y, statistics = kernels.expert_linear(
        x,
        fold(weights, [draw(out, dtype=dtype) + 3] * experts, (), ()),
        None,
        rows,
        bounds,
        0.0,
        "gelu",
        with_statistics=True,
        tile=EDGES,
    )
    assert statistics is not None
    named = slice(None) if rows is None else rows
    expected = moments(y, EDGES.block_n // EDGES.slices)[named]
    torch.testing.assert_close(
        statistics.parts[named].double(), expected, rtol=1e-5, atol=1e-6, msg=shape
    )


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_every_slice_of_a_tile_has_its_own_columns(slices: int) -> None:
    """Two tiles of columns, the second of which ends within a slice."""
    x, residual, weights = draw(20, 24), draw(20, 101), [draw(101, 24) for _ in range(2)]
    vectors = [[draw(size) for _ in weights] for size in (101, 24, 24)]
    tile = kernels.Tile(16, 64, 16, 2, 4, 2, slices=slices)
    call = (residual, None, (0, 9, 20), 1e-5, "gelu")
    y, statistics = kernels.expert_linear(
        x, fold(weights, *vectors), *call, with_statistics=True, tile=tile
    )
    expected = formula(x, weights, *vectors, *call)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5)
    assert statistics is not None
    torch.testing.assert_close(
        statistics.parts.double(), moments(expected, 64 // slices), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("width", [3, 7, 32, 100])
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_statistics_of_the_op_before_give_the_same_rows(
    dtype: str, width: int, shift: float
) -> None:
    """LayerNorm from moments of parts, whatever the parts: with a mean 50 deviations away, too."""
    x = draw(19, 70, dtype=dtype) + shift
    weights, bias = [draw(24, 70, dtype=dtype)], [draw(24, dtype=dtype)]
    gamma, beta = [draw(70, dtype=dtype)], [draw(70, dtype=dtype)]
    given = kernels.RowStatistics(moments(x, width).float(), width)
    folded = fold(weights, bias, gamma, beta)
    arguments = (None, None, (0, 19), 1e-5, "none")
    ours, _ = kernels.expert_linear(x, folded, *arguments, statistics=given)
    group = (weights, bias, gamma, beta)
    truth = formula(x.double(), *([t.double() for t in own] for own in group), *arguments)
    norm = Norm(gamma, beta)
    plain = plain_linear(LinearOperands(x, weights, bias, norm, None, None, (0, 19)), False)
    assert_near(op_parity(ours.cpu(), plain.cpu(), truth.cpu()), "from given statistics")


def test_sums_of_unrounded_weights_would_be_seen() -> None:
    """The planted bug that the file's docstring warns of breaks the rule by far."""
    x, weights = draw(19, 256, dtype="fp16") + 50, [draw(24, 256, dtype="fp16") / 16]
    gamma, beta = [draw(256, dtype="fp16")], [draw(256, dtype="fp16")]
    folded = fold(weights, (), gamma, beta)
    wrong = folded._replace(sums=(weights[0].float() * gamma[0].float()).sum(1)[None])
    arguments = (None, None, (0, 19), 1e-5, "none")
    doubles = [[t.double() for t in own] for own in (weights, [], gamma, beta)]
    truth = formula(x.double(), *doubles, *arguments).cpu()
    operands = LinearOperands(x, weights, None, Norm(gamma, beta), None, None, (0, 19))
    plain = plain_linear(operands, False).cpu()
    right, _ = kernels.expert_linear(x, folded, *arguments)
    assert_near(op_parity(right.cpu(), plain, truth), "sums of rounded weights")
    spoiled, _ = kernels.expert_linear(x, wrong, *arguments)
    assert not op_parity(spoiled.cpu(), plain, truth).passed


@pytest.mark.parametrize(
    "shape", [pytest.param("tile edges", marks=pytest.mark.full), "middle expert empty"]
)
def test_descriptors_load_what_pointers_load(shape: str) -> None:
    bounds, _, out = SHAPES[shape]
    x, residual = draw(bounds[-1], 72, dtype="fp16"), draw(bounds[-1], out, dtype="fp16")
    experts = range(len(bounds) - 1)
    weights = [draw(out, 72, dtype="fp16") for _ in experts]
    vectors = [[draw(size, dtype="fp16") for _ in experts] for size in (out, 72, 72)]
    folded = fold(weights, *vectors)
    ours, expected = (
        kernels.expert_linear(
            x, folded, residual, None, bounds, 1e-5, "gelu", tile=EDGES._replace(tma=tma)
        )[0]
        for tma in (True, False)
    )
    assert torch.equal(ours, expected)


def test_more_experts_than_one_launch_takes() -> None:
    bounds = (0, 3, 3, 8, 9, 20)
    x, weights = draw(20, 24), [draw(40, 24) for _ in range(5)]
    biases, norm = (
        [draw(40) for _ in range(5)],
        Norm([draw(24) for _ in range(5)], [draw(24) for _ in range(5)]),
    )
    how: dict[str, Any] = {"biases": biases, "norm": norm, "bounds": bounds, "activation": "gelu"}
    y = expert_linear(x, weights, **how, impl="triton")
    expected = expert_linear(x, weights, **how, impl="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "apart", "fits"),
    [
        pytest.param(0, 40, True, id="whole rows"),
        pytest.param(2, 40, False, id="between 16 bytes"),
        pytest.param(0, 0, False, id="one row"),
        pytest.param(0, 16, False, id="overlapping rows"),
    ],
)
def test_rows_that_descriptors_do_not_take_are_read_without_them(
    first: int, apart: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of descriptors begin at multiples of 16 bytes, and none in another; the interpreter would take any."""
    made: list[int] = []
    make = kernels.TensorDescriptor.from_tensor

    def seen(tensor: Tensor, *rest: Any) -> Any:
        made.append(tensor.data_ptr() % 16)
        return make(tensor, *rest)

    monkeypatch.setattr(kernels.TensorDescriptor, "from_tensor", seen)
    x, weight = draw(6, 40).as_strided((6, 24), (apart, 1), first), draw(40, 24)
    folded, tile = kernels.FoldedWeights(weight[None], None, None), EDGES._replace(tma=True)
    y, _ = kernels.expert_linear(x, folded, None, None, (0, 6), 1e-5, "none", tile=tile)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-5)
    assert made == ([0, 0] if fits else [])


def test_the_same_parts_as_one_expert_or_two_are_not_confused() -> None:
    x, first, second = draw(6, 8), draw(5, 8), draw(5, 8)
    for weights in ([(first, second)], [first, second], [(first, second)]):
        bounds = (0, 6) if len(weights) == 1 else (0, 2, 6)
        y = expert_linear(x, weights, bounds=bounds, impl="triton")
        expected = expert_linear(x, weights, bounds=bounds, impl="reference")
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_changed_weight_is_folded_again() -> None:
    x, weight, norm = draw(6, 8), draw(5, 8), Norm([draw(8)], [draw(8)])
    for _ in range(2):
        y = expert_linear(x, [weight], bounds=(0, 6), norm=norm, impl="triton")
        expected = expert_linear(x, [weight], bounds=(0, 6), norm=norm, impl="reference")
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        norm.weights[0].mul_(2)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_rows_that_are_not_named_are_zero(dtype: str) -> None:
    x, weight = draw(6, 8, dtype=dtype), draw(5, 8, dtype=dtype)
    rows, residual = torch.tensor([4, 1], device=DEVICE), torch.full_like(draw(6, 5), 7.0)
    residual = residual.to(x.dtype)
    y = expert_linear(x, [weight], bounds=(0, 2), residual=residual, rows=rows, impl="triton")
    assert y[[0, 2, 3, 5]].abs().max() == 0
    torch.testing.assert_close(y[rows], x[rows] @ weight.T + 7.0, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("operand", ["weight", "residual", "x", "bias", "norm"])
def test_operands_in_any_memory_order(operand: str) -> None:
    parts = {
        "x": draw(9, 16),
        "weight": draw(24, 16),
        "bias": draw(24),
        "norm": draw(16),
        "residual": draw(9, 24),
    }

    def call() -> Tensor:
        norm = Norm([parts["norm"]], [parts["norm"]])
        return expert_linear(
            parts["x"],
            [parts["weight"]],
            [parts["bias"]],
            bounds=(0, 9),
            norm=norm,
            residual=parts["residual"],
            impl="triton",
        )

    expected = call()
    whole = parts[operand]
    parts[operand] = torch.stack([whole] * 2, dim=-1)[..., 0]
    assert torch.equal(call(), expected)
    if whole.dim() == 2:
        parts[operand] = whole.T.contiguous().T
        assert torch.equal(call(), expected)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_a_row_that_is_not_finite_stays_alone(dtype: str) -> None:
    x = draw(40, 48, dtype=dtype)
    weights = [draw(24, 48, dtype=dtype) for _ in range(2)]
    norm = Norm([torch.ones_like(x[0])] * 2, [torch.zeros_like(x[0])] * 2)

    def call(x: Tensor) -> Tensor:
        bounds = (0, 17, 40)
        return expert_linear(x, weights, bounds=bounds, norm=norm, activation="gelu", impl="triton")

    clean = call(x)
    for poison in (math.nan, math.inf):
        spoiled = x.clone()
        spoiled[20, 3] = poison
        y = call(spoiled)
        others = torch.arange(40, device=DEVICE) != 20
        assert torch.equal(y[others], clean[others])
        assert bool(y[20].isnan().all())
