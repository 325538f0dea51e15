"""The CUDA kernels of products in 8 bits, their instructions emulated: against the formula in fp64, in every order."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from emulated_float8 import Result, Weights, float8_linear, quantize_rows
from emulated_linear import ORDERS
from test_cuda_expert_linear import Case, moments
from torch import Tensor

from beit3_fast.composite.float8_linear import float8_linear as plain_linear
from beit3_fast.float8 import BLOCK, E4M3, Quantized, dequantize, quantize
from beit3_fast.ops.cuda_float8 import folded
from beit3_fast.parity import op_parity
from beit3_fast.reference.float8_linear import float8_linear as formula

CASES = {
    "one row": Case((0, 1), 16, 16, norm=True),
    "7 rows": Case((0, 7), 144, 272, gelu=True, residual=True),
    "129 rows": Case((0, 129), 208, 144, norm=True, gelu=True),
    "two experts": Case((0, 130, 200), 208, 272, norm=True, gelu=True, residual=True),
    "three experts": Case((0, 3, 140, 200), 80, 48, bias=False, residual=True),
    "middle expert empty": Case((0, 129, 129, 200), 144, 144, norm=True),
    "first expert empty": Case((0, 0, 7), 128, 128, gelu=True),
    "deep": Case((0, 40, 70), 1040, 32, norm=True, gelu=True, residual=True),
}


class Operands(NamedTuple):
    """Tensors of one call, in the order in which every implementation takes them."""

    x: Tensor
    weights: list[Quantized]
    biases: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    residual: Tensor | None

    def doubles(self) -> Operands:
        """The weights stay as they are rounded."""
        biases, gammas, betas = ([t.double() for t in group] for group in self[2:5])
        residual = None if self.residual is None else self.residual.double()
        return Operands(self.x.double(), self.weights, biases, gammas, betas, residual)


def draw(case: Case, shift: float = 0.0) -> Operands:
    generator = torch.Generator().manual_seed(sum(case.bounds) + case.inner)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).bfloat16()

    experts, count = range(len(case.bounds) - 1), case.bounds[-1]
    drawn = [normal(case.out, case.inner, scale=case.inner**-0.5) for _ in experts]
    # Rows and columns whose scales differ widely.
    sizes = torch.logspace(-2, 2, count)[:, None].bfloat16()
    return Operands(
        normal(count, case.inner) * sizes + shift,
        [quantize(own, case.inner) for own in drawn],
        [normal(case.out) for _ in experts] if case.bias else [],
        [torch.ones(case.inner).bfloat16() for _ in experts] if case.norm else [],
        [normal(case.inner, scale=0.1) for _ in experts] if case.norm else [],
        normal(count, case.out) if case.residual else None,
    )


def kernel_weights(operands: Operands) -> Weights:
    numbers, scales = zip(*operands.weights, strict=True)
    return Weights(*folded(list(numbers), list(scales), *operands[2:5]))


def launch(case: Case, operands: Operands, order: str = "eager", **options: int) -> Result:
    return float8_linear(
        quantize(operands.x),
        kernel_weights(operands),
        operands.residual,
        case.bounds,
        1e-5,
        "gelu" if case.gelu else "none",
        statistics=(moments(operands.x, BLOCK).float(), BLOCK) if case.norm else None,
        order=order,
        **options,
    )


def check(case: Case, operands: Operands, result: Result) -> None:
    tail = (None, case.bounds, 1e-5, "gelu" if case.gelu else "none")
    truth, plain = formula(*operands.doubles(), *tail), plain_linear(*operands, *tail)
    assert result.y is not None
    parity = op_parity(result.y, plain, truth)
    assert parity.passed, parity.reason
    check_left(result.y, result)


def check_left(y: Tensor, result: Result) -> None:
    """What is left behind follows from y to the bit, but for the moments."""
    expected = quantize(y)
    assert torch.equal(result.rounded.scales, expected.scales)
    assert torch.equal(result.rounded.numbers.view(torch.uint8), expected.numbers.view(torch.uint8))
    torch.testing.assert_close(
        result.parts.double(), moments(y, BLOCK), rtol=1e-5, atol=1e-5 * float(y.abs().max())
    )


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str) -> None:
    turn = list(CASES).index(name)
    operands = draw(CASES[name])
    check(CASES[name], operands, launch(CASES[name], operands, ORDERS[turn % 3]))


@pytest.mark.parametrize("name", ["7 rows", "two experts", "deep"])
def test_low_tiles(name: str) -> None:
    operands = draw(CASES[name])
    check(CASES[name], operands, launch(CASES[name], operands, "random", bands=1))


@pytest.mark.parametrize("name", ["7 rows", "three experts", "deep"])
def test_portable(name: str) -> None:
    operands = draw(CASES[name])
    check(CASES[name], operands, launch(CASES[name], operands, "late", bands=0))


@pytest.mark.full
@pytest.mark.parametrize("bands", [0, 1, 2])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_forward_long(name: str, order: str, bands: int) -> None:
    operands = draw(CASES[name])
    check(CASES[name], operands, launch(CASES[name], operands, order, processors=3, bands=bands))


def test_every_order_gives_the_same_bits() -> None:
    case = CASES["two experts"]
    operands = draw(case)
    expected = launch(case, operands, "eager", processors=1)
    assert expected.y is not None
    for order, seed in (("late", 0), ("random", 1), ("random", 2)):
        result = launch(case, operands, order, processors=1, seed=seed)
        assert result.y is not None
        assert torch.equal(result.y, expected.y)
        assert torch.equal(result.parts, expected.parts)


def test_sums_in_fp32_between_blocks() -> None:
    """Tensor cores alone would lose what is 2^14 times smaller than the sum so far."""
    depth, out = 16 * BLOCK, 16
    x = torch.full((3, depth), 2.0**-8)
    x[:, :BLOCK] = 1.0
    weight = quantize(torch.ones(out, depth), depth)
    weights = Weights(weight.numbers[None], weight.scales.view(1, out), None, None)
    for bands in (0, 1, 2):
        result = float8_linear(quantize(x), weights, None, (0, 3), 0.0, "none", bands=bands)
        assert result.y is not None
        expected = x.sum(1, keepdim=True).expand(3, out)
        torch.testing.assert_close(result.y.float(), expected, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("bands", [0, 1])
def test_the_result_in_8_bits_alone(bands: int) -> None:
    case = CASES["7 rows"]
    operands = draw(case)
    both = launch(case, operands, bands=bands)
    alone = launch(case, operands, bands=bands, stores=False)
    assert alone.y is None
    for ours, own in zip(alone.rounded, both.rounded, strict=True):
        assert torch.equal(ours.view(torch.uint8), own.view(torch.uint8))
    assert torch.equal(alone.parts, both.parts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_poison_stays_in_its_row(bad: float) -> None:
    case = CASES["three experts"]
    operands = draw(case)
    clean = launch(case, operands)
    operands.x[5, 3] = bad
    spoiled = launch(case, operands)
    assert clean.y is not None
    assert spoiled.y is not None
    assert spoiled.y[5].isnan().all()
    assert dequantize(spoiled.rounded)[5].isnan().all()
    others = torch.arange(len(operands.x)) != 5
    assert torch.equal(spoiled.y[others], clean.y[others])


def test_a_result_that_is_not_finite_is_seen_in_8_bits() -> None:
    case = Case((0, 2), 16, 144)
    operands = draw(case)
    operands.biases[0][3] = float("inf")
    result = launch(case, operands)
    rounded = dequantize(result.rounded)
    assert rounded[:, :BLOCK].isnan().all()
    assert rounded[:, BLOCK:].isfinite().all()


@pytest.mark.parametrize(("inner", "out"), [(24, 16), (16, 24)])
def test_sizes_that_are_refused(inner: int, out: int) -> None:
    case = Case((0, 3), inner, out)
    with pytest.raises(RuntimeError, match="features that are multiples of 16"):
        launch(case, draw(case))


@pytest.mark.parametrize("columns", [16, 128, 144, 272, 528])
@pytest.mark.parametrize("order", ["eager", "random"])
def test_quantized_rows(columns: int, order: str) -> None:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(9, columns, generator=generator) * torch.logspace(-16, 16, 9)[:, None]
    x[3] = 0.0
    x[4, -1] = 1e-30
    rows = x.bfloat16()
    rounded, parts = quantize_rows(rows, 2, order)
    expected = quantize(rows)
    assert torch.equal(rounded.scales, expected.scales)
    assert torch.equal(dequantize(rounded), dequantize(expected))
    truth = moments(rows, BLOCK)
    for ours, own in zip(parts.double().unbind(2), truth.unbind(2), strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))


def test_quantized_rows_that_are_not_finite() -> None:
    x = torch.ones(3, 272).bfloat16()
    x[0, 5], x[1, 200], x[2, 260] = float("nan"), float("inf"), float("-inf")
    rounded, _ = quantize_rows(x)
    found = dequantize(rounded).isnan()
    assert found[0, 5]
    assert found[1, BLOCK : 2 * BLOCK].all()
    assert found[2, 2 * BLOCK :].all()
    assert found.sum() == 1 + BLOCK + 16


def test_every_8_bit_number_survives() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 127) != 127].view(E4M3)  # the others are NaN
    x = torch.zeros(254, 256)
    x[:, 0] = numbers.float()
    own = Quantized(x.to(E4M3), torch.ones(254, 2))
    weight = Quantized(torch.eye(16, 256).to(E4M3), torch.ones(16, 1))
    weights = Weights(weight.numbers[None], weight.scales.view(1, 16), None, None)
    result = float8_linear(own, weights, None, (0, 254), 0.0, "none")
    assert result.y is not None
    assert torch.equal(result.y[:, 0].float(), numbers.float())
