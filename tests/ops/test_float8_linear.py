"""float8_linear: the formula on numbers that 8 bits hold, and PyTorch's calls beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_fast.ops import Norm, expert_linear
from beit3_fast.ops.packed_weight import quantize_float8

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


@pytest.mark.parametrize("activation", [None, "gelu"])
@torch.no_grad()
def test_composite_is_the_formula(activation: str | None) -> None:
    """LayerNorm, whose weights are powers of two, so that both round the same rows; results differ by one rounding."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).bfloat16()

    x, residual, biases = normal(9, 200), normal(9, 64), [normal(64) for _ in range(3)]
    weights = [quantize_float8(normal(64, 200) / 14) for _ in range(3)]
    gammas = [
        2.0 ** torch.randint(-2, 3, (200,), generator=draw).to(torch.bfloat16) for _ in range(3)
    ]
    norm = Norm(gammas, [normal(200) for _ in range(3)])
    options: dict[str, Any] = {"bounds": BOUNDS, "activation": activation}
    found, expected = (
        expert_linear(x, weights, biases, norm=norm, residual=residual, impl=impl, **options)
        for impl in ("composite", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-4)
    assert (found == expected).float().mean() > 0.9
    wide = Norm([g.double() for g in norm.weights], [b.double() for b in norm.biases])
    plain, added = [weight.unpack().double() for weight in weights], [b.double() for b in biases]
    options["residual"] = residual.double()
    exact = expert_linear(x.double(), plain, added, norm=wide, impl="reference", **options)
    error = (found - exact).norm() / exact.norm()
    assert 4e-3 < error < 6e-2, "rows are rounded to 8 bits, which is more than bf16's error"
