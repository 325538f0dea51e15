"""Derivatives that no kernel has (forward mode, torch.func, second order) come from PyTorch's calls, never as silent zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from beit3_fast.errors import KernelUnavailable
from beit3_fast.layout import TokenLayout
from beit3_fast.model import create_model
from beit3_fast.ops import Norm, expert_linear, masked_linear_cross_entropy, shared_attention

LAYOUT = TokenLayout.from_lengths([4, 3], [2, 1])
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers that every dtype has."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16().to(dtype)


def linear(impl: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weights = [draw(24, 32, dtype=dtype, seed=seed) for seed in (1, 2)]
    norm = Norm([draw(32, dtype=dtype, seed=3)] * 2, [draw(32, dtype=dtype, seed=4)] * 2)
    how: dict[str, Any] = {"bounds": (0, 7, 10), "norm": norm, "activation": "gelu", "impl": impl}
    return lambda x: expert_linear(x, weights, **how)


def attention(impl: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda q: shared_attention(q, q, q, LAYOUT, num_heads=2, mask="seq2seq", impl=impl)


def assert_near(found: Tensor, truth: Tensor) -> None:
    most = 1e-2 if found.dtype is torch.bfloat16 else 1e-5
    assert (found - truth).norm() <= most * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [linear, attention])
@pytest.mark.parametrize("impl", ["auto", "composite"])
def test_forward_mode(op: Any, dtype: torch.dtype, impl: str) -> None:
    x, tangent = draw(10, 32, dtype=dtype, seed=5), draw(10, 32, dtype=dtype, seed=6)
    wide = op("reference", torch.float64)
    _, expected = torch.func.jvp(wide, (x.double(),), (tangent.double(),))
    call = op(impl, dtype)
    _, found = torch.func.jvp(call, (x,), (tangent,))
    assert_near(found, expected)
    with fwAD.dual_level():
        dual = fwAD.unpack_dual(call(fwAD.make_dual(x, tangent))).tangent
    assert dual is not None
    assert_near(dual, expected)


@pytest.mark.parametrize("impl", ["auto", "composite"])
def test_forward_mode_of_a_loss(impl: str) -> None:
    x, tangent, weight = draw(6, 16), draw(6, 16, seed=1), draw(30, 16, seed=2)
    named = torch.tensor([0, 3]), torch.tensor([4, 7])

    def loss(own: Tensor, impl: str) -> Tensor:
        return masked_linear_cross_entropy(own, weight, None, *named, impl=impl)

    _, expected = torch.func.jvp(lambda own: loss(own, "reference"), (x,), (tangent,))
    _, found = torch.func.jvp(lambda own: loss(own, impl), (x,), (tangent,))
    assert_near(found, expected)


@pytest.mark.parametrize("op", [linear, attention])
def test_torch_func(op: Any) -> None:
    x, call = draw(3, 10, 32, seed=5), op("auto", torch.float32)
    torch.testing.assert_close(torch.func.vmap(call)(x), torch.stack([call(own) for own in x]))
    leaf = x[0].clone().requires_grad_()
    call(leaf).square().sum().backward()
    found = torch.func.grad(lambda own: call(own).square().sum())(x[0])
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [linear, attention])
def test_a_kernel_asked_for_by_name_says_that_it_cannot(op: Any) -> None:
    x = draw(10, 32)
    with pytest.raises(KernelUnavailable, match="has reverse-mode gradients only"):
        torch.func.jvp(op("cpu", torch.float32), (x,), (x,))


def test_forward_mode_of_a_model() -> None:
    model = create_model("beit3_tiny_patch16_32_imageclassification").eval()
    image, tangent = draw(1, 3, 32, 32), draw(1, 3, 32, 32, seed=1)
    plain = model(image)
    y, found = torch.func.jvp(model, (image,), (tangent,))
    torch.testing.assert_close(y, plain)
    model.beit3.impl = "reference"
    _, expected = torch.func.jvp(model, (image,), (tangent,))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_order(dtype: torch.dtype) -> None:
    def penalty(x: Tensor, w: Tensor, impl: str) -> tuple[Tensor, ...]:
        y = expert_linear(x, [w], bounds=(0, 6), impl=impl)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, w])

    leaves = [draw(6, 32, dtype=dtype), draw(32, 32, dtype=dtype, seed=1)]
    found = penalty(*(leaf.clone().requires_grad_() for leaf in leaves), "auto")
    expected = penalty(*(leaf.double().requires_grad_() for leaf in leaves), "reference")
    for own, truth in zip(found, expected, strict=True):
        assert_near(own, truth)
