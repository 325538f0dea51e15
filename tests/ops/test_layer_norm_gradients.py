"""Gradients of LayerNorm parameters from many rows in 16 bits, where PyTorch's own sums on a CPU stand still."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.composite._layer_norm import layer_norm
from beit3_fast.composite.expert_linear import expert_linear_backward
from beit3_fast.ops import Norm, expert_linear

ROWS, WIDTH, OUT = 6000, 48, 8


def operands(dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows with a gradient whose mean is not zero: the same in every dtype but for its rounding."""
    draw = torch.Generator().manual_seed(0)
    named = {
        "x": torch.randn(ROWS, WIDTH, generator=draw) + 0.3,
        "gamma": 1 + 0.2 * torch.randn(WIDTH, generator=draw),
        "beta": 0.2 * torch.randn(WIDTH, generator=draw),
        "weight": torch.randn(OUT, WIDTH, generator=draw) / 7,
        "grad": torch.randn(ROWS, OUT, generator=draw) + 0.5,
    }
    return {name: tensor.bfloat16().to(dtype) for name, tensor in named.items()}


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def gradients(dtype: torch.dtype, impl: str, parameters: torch.dtype | None = None) -> list[Tensor]:
    own = operands(dtype)
    gamma, beta = (own[name].to(parameters or dtype).requires_grad_() for name in ("gamma", "beta"))
    if impl == "layer_norm":
        y = F.linear(layer_norm(own["x"], gamma, beta, 1e-5), own["weight"])
    else:
        norm = Norm([gamma], [beta])
        y = expert_linear(own["x"], [own["weight"]], bounds=(0, ROWS), norm=norm, impl=impl)
    y.backward(own["grad"])
    assert gamma.grad is not None
    assert beta.grad is not None
    assert gamma.grad.dtype == gamma.dtype
    return [gamma.grad, beta.grad]


@pytest.mark.parametrize("impl", ["composite", "auto", "layer_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_rows(dtype: torch.dtype, impl: str) -> None:
    truth = gradients(torch.float64, "composite")
    for ours, expected in zip(gradients(dtype, impl), truth, strict=True):
        assert error(ours, expected.double()) < 0.005


def test_parameters_in_fp32_under_rows_in_bfloat16() -> None:
    """What autocast gives."""
    truth = gradients(torch.float64, "layer_norm")
    own = operands(torch.bfloat16)
    gamma, beta = (own[name].float().requires_grad_() for name in ("gamma", "beta"))
    y = F.linear(layer_norm(own["x"], gamma, beta, 1e-5).bfloat16(), own["weight"])
    y.backward(own["grad"])
    for parameter, expected in zip((gamma, beta), truth, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert error(parameter.grad, expected.double()) < 0.005


def test_the_formula_for_recomputation() -> None:
    truth = gradients(torch.float64, "composite")
    own = operands(torch.bfloat16)
    args = ([own["weight"]], [], [own["gamma"]], [own["beta"]], None, (0, ROWS), 1e-5, "")
    found = expert_linear_backward(own["grad"], own["x"], *args)
    for ours, expected in zip((found[3][0], found[4][0]), truth, strict=True):
        assert error(ours, expected.double()) < 0.005


def test_the_gradient_of_the_rows_is_as_ever() -> None:
    own = operands(torch.bfloat16)
    grad = own["grad"] @ own["weight"]
    found = []
    for call in (layer_norm, lambda x, w, b, eps: F.layer_norm(x, (WIDTH,), w, b, eps)):
        x, gamma, beta = (own[name].clone().requires_grad_() for name in ("x", "gamma", "beta"))
        y = call(x, gamma, beta, 1e-5)
        y.backward(grad)
        found.append((y.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # type: ignore[arg-type]
