"""expert_linear on CPU of what is infinite, not a number, at the ends of a dtype's range or between two numbers of it.

test_cpu_kernels.py runs these at every level below this CPU's own as well.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import DTYPES, EPS, OPS, Linear


def test_bfloat16_is_rounded_to_the_nearest_ties_to_even() -> None:
    x = torch.tensor([256.0, 258.0, -256.0, -258.0, 3.0])[:, None].bfloat16()
    residual = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.005])[:, None].bfloat16()
    weight = torch.ones(1, 1).bfloat16()
    y = OPS.expert_linear(x, [weight], [], [], [], [], residual, None, [0, 5], EPS, "none")
    assert torch.equal(y, x + residual)
    assert y[:4].flatten().tolist() == [256.0, 260.0, -256.0, -260.0]


def test_gelu_of_special_values() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e30, -1e30, -5.0, -5.8, 1e-20])[:, None]
    y = OPS.expert_linear(
        x, [torch.ones(1, 1)], [], [], [], [], None, None, [0, len(x)], EPS, "gelu"
    ).flatten()
    assert y[0].isnan()
    assert y[1] == math.inf
    assert y[2:6].tolist() == [0, 0, pytest.approx(1e30), 0]
    truth = F.gelu(x[6:].double()).flatten()
    torch.testing.assert_close(y[6:].double(), truth, rtol=0, atol=2e-7)
    assert y[8] == pytest.approx(5e-21)


def test_gelu_of_every_bfloat16_up_to_its_tail() -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = x[x.isfinite() & (x > -5.5)][:, None]
    weight, bias = torch.ones(72, 1).bfloat16(), torch.zeros(72).bfloat16()
    y, plain = (
        OPS.expert_linear(x, [weight], [], biases, [], [], None, None, [0, len(x)], EPS, "gelu")
        for biases in ([bias], [])
    )
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert torch.equal(y, plain)
    values, truth = y[:, 0].double(), F.gelu(x[:, 0].double())
    rounding = truth.abs() * 2**-8 + 1e-37
    near = x[:, 0] > -3.6
    assert ((values - truth).abs() <= rounding + truth.abs() * torch.where(near, 1e-3, 6e-3)).all()


def test_a_bad_row_spoils_no_other() -> None:
    """Not a number in one row, and in the scratch memory that it leaves behind, stays in that row."""
    for dtype in DTYPES.values():
        case = Linear(dtype, (40, 70, 50))
        clean = case.run()
        x = case.x.clone()
        x[17] = math.nan
        spoilt = case.run(x=x)
        keep = torch.arange(40) != 17
        assert spoilt[17].isnan().all()
        assert torch.equal(spoilt[keep], clean[keep])
        case.run(x=torch.full_like(x, math.nan))
        assert torch.equal(case.run(), clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_narrow_product_does_not_look_at_what_a_wide_one_left(dtype: str) -> None:
    wide, narrow = (Linear(DTYPES[dtype], (70, 70, columns)) for columns in (96, 5))
    wide.run()
    clean = narrow.run()
    wide.run(x=torch.full_like(wide.x, math.nan))
    assert torch.equal(narrow.run(), clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [40, 80, 144])
def test_a_bad_channel_spoils_no_other(depth: int, dtype: str) -> None:
    """Nor does what lies behind a panel whose depth ends inside a chunk."""
    x, weight = (torch.randn(rows, depth, dtype=DTYPES[dtype]) for rows in (45, 96))
    clean = OPS.expert_linear(x, [weight], [], [], [], [], None, None, [0, 45], EPS, "none")
    weight[32:64] = math.nan
    spoilt = OPS.expert_linear(x, [weight], [], [], [], [], None, None, [0, 45], EPS, "none")
    assert spoilt[:, 32:64].isnan().all()
    keep = torch.arange(96) // 32 != 1
    assert torch.equal(spoilt[:, keep], clean[:, keep])
    weight[33:64] = weight[65:96]
    spoilt = OPS.expert_linear(x, [weight], [], [], [], [], None, None, [0, 45], EPS, "none")
    assert torch.equal(spoilt[:, 33:64], clean[:, 65:96])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_of_rows_too_large_for_fp32_is_not_a_number(dtype: str) -> None:
    """Finite numbers whose squares are not: their variance is unknown, and zeros would hide it."""
    case = Linear(DTYPES[dtype], (6, 130, 40))
    clean, x = case.run(), case.x.clone()
    x[1] *= 1e20
    x[3, 77] = 3e38
    x[4] = 3e38 * x[4].sign()
    spoilt = case.run(x=x)
    assert spoilt[[1, 3, 4]].isnan().all()
    assert torch.equal(spoilt[[0, 2, 5]], clean[[0, 2, 5]])
    assert case.run(x=case.x * 1e15).isfinite().all()


@pytest.mark.parametrize("depth", [32, 800])
def test_fp32_products_keep_the_last_digits(depth: int) -> None:
    """Errors of 2^-18 of a factor, which a level that multiplies parts of numbers could make, are a dozen times as large."""
    generator = torch.Generator().manual_seed(depth)
    x, weight = (torch.randn(rows, depth, generator=generator) for rows in (64, 96))
    y = OPS.expert_linear(x, [weight], [], [], [], [], None, None, [0, 64], EPS, "none")
    truth = x.double() @ weight.double().T
    error, allowed = ((z - truth).norm().item() for z in (y, F.linear(x, weight)))
    assert error <= 2 * allowed


@pytest.mark.parametrize("depth", [70, 800])
def test_fp32_products_at_the_ends_of_its_range(depth: int) -> None:
    """What a level that multiplies parts of numbers cannot take apart is what it is for the others."""
    generator = torch.Generator().manual_seed(depth)
    x = torch.randn(50, depth, generator=generator)
    weight = torch.randn(40, depth, generator=generator) / 20
    weight[4] = 0
    weight[8, 3] = math.inf
    weight[9, 1] = -math.inf
    x[3, 5] = math.inf
    x[7, 1], x[7, 2] = -math.inf, math.inf
    x[11, 0], x[13, depth - 1] = 3.4e38, -torch.finfo(torch.float32).max
    x[17] *= 1e-30
    truth = F.linear(x, weight)
    y = OPS.expert_linear(x, [weight], [], [], [], [], None, None, [0, 50], EPS, "none")
    assert y[11].isfinite().sum() == y[13].isfinite().sum() == 38
    assert y[3].isinf().sum() > 30
    torch.testing.assert_close(y, truth, rtol=2e-5, atol=2e-5, equal_nan=True)
    torch.testing.assert_close(y[17] * 1e30, truth[17] * 1e30, rtol=2e-5, atol=2e-5, equal_nan=True)
