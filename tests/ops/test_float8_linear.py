"""float8_linear: numbers of 8 bits, products of numbers that 8 bits hold, and every implementation beside fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beit3_fast.float8 import BLOCK, dequantize, quantize
from beit3_fast.ops import Norm, expert_linear
from beit3_fast.ops.packed_weight import quantize_float8
from beit3_fast.parity import op_parity

BOUNDS = (0, 4, 4, 9)
IMPLS = ("reference", "composite")


def numbers(*shape: int, seed: int) -> Tensor:
    """Whole numbers from -8 to 8: e4m3 holds each, whatever power of two it is scaled by."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_rows", [False, True])
def test_what_8_bits_hold_is_multiplied_as_ever(impl: str, with_rows: bool) -> None:
    x, residual = numbers(12, 272, seed=0), numbers(12, 48, seed=1)
    plain = [numbers(48, 272, seed=2 + expert) for expert in range(3)]
    biases = [numbers(48, seed=8 + expert) for expert in range(3)]
    options: dict[str, Any] = {
        "bounds": BOUNDS,
        "residual": residual if with_rows else residual[:9],
    }
    if with_rows:
        options["rows"] = torch.tensor([9, 2, 4, 11, 0, 7, 5, 1, 10])
    own = x if with_rows else x[:9]
    expected = expert_linear(own, plain, biases, impl="reference", **options)
    with torch.no_grad():
        found = expert_linear(
            own, [quantize_float8(weight) for weight in plain], biases, impl=impl, **options
        )
    assert torch.equal(found, expected)


def test_numbers_are_within_half_a_step_and_stay_what_they_are() -> None:
    x = torch.randn(50, 300) * torch.logspace(-12, 12, 50)[:, None]
    found = dequantize(quantize(x))
    blocks = [part.abs().amax(1, keepdim=True).expand_as(part) for part in x.split(BLOCK, 1)]
    step = torch.maximum(x.abs() * 2.0**-4, torch.cat(blocks, 1) * 2.0**-17)
    assert ((found - x).abs() <= step).all()
    assert torch.equal(dequantize(quantize(found)), found)
    assert torch.equal(found.bfloat16().float(), found)


def test_zeros_and_numbers_that_are_not_finite() -> None:
    x = torch.ones(4, 200)
    x[0], x[1, 3], x[2, 150], x[3] = 0.0, torch.nan, torch.inf, 1e-25
    found = dequantize(quantize(x))
    assert torch.equal(found[0], x[0])
    assert found[1, :BLOCK].isnan().all()
    assert torch.equal(found[1, BLOCK:], x[1, BLOCK:])
    assert found[2, BLOCK:].isnan().all()
    assert (found[3] == 0).all()


@pytest.mark.parametrize("impl", ["composite", "reference"])
@pytest.mark.parametrize("case", range(8))
def test_the_op_by_every_implementation(impl: str, case: int) -> None:
    with_norm, gelu, named = (bool(case >> bit & 1) for bit in range(3))
    generator = torch.Generator().manual_seed(case)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    x, residual = normal(9, 200), normal(9, 24)
    own = [quantize_float8(normal(24, 200) / 14) for _ in range(2)]
    biases = [normal(24) for _ in own]
    norm = Norm([normal(200) for _ in own], [normal(200) for _ in own]) if with_norm else None
    rows = torch.tensor([4, 0, 8, 2, 6, 1]) if named else None
    options: dict[str, Any] = {"bounds": (0, 2, 6) if named else (0, 2, 9), "norm": norm}
    options |= {"activation": "gelu" if gelu else None, "residual": residual, "rows": rows}
    found = expert_linear(x, own, biases, impl=impl, **options)
    expected = torch.zeros(9, 24, dtype=torch.float64)
    for e in range(2):
        first, last = options["bounds"][e : e + 2]
        places = torch.arange(9)[first:last] if rows is None else rows[first:last]
        part, weight = x[places].double(), own[e].unpack(torch.float64)
        scaled = part if norm is None else part * norm.weights[e].double()
        y = dequantize(quantize(scaled)).double() @ weight.T
        if norm is not None:
            mean = part.mean(1, keepdim=True) * (weight @ norm.weights[e].double())
            deviation = (part.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
            y = (y - mean) / deviation + weight @ norm.biases[e].double()
        y = y + biases[e].double()
        expected[places] = (nn.functional.gelu(y) if gelu else y) + residual[places].double()
    assert op_parity(found, expected.bfloat16(), expected).passed
