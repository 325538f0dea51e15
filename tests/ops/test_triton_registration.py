"""What torch.library knows of the Triton ops: schema, shape function, gradient, tracing without breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import (
    Norm,
    expert_linear,
    measured_expert_linear,
    measured_shared_attention,
)

OPS = torch.ops.beit3_fast


def draw(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, device=DEVICE).requires_grad_(grad)


def detached(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        [t.detach() for t in own]
        if isinstance(own, list) and own and isinstance(own[0], Tensor)
        else own.detach()
        if isinstance(own, Tensor)
        else own
        for own in arguments
    )


@pytest.mark.parametrize(
    ("grad", "rows"), [(True, False), pytest.param(False, True, marks=pytest.mark.full)]
)
def test_opcheck_expert_linear(grad: bool, rows: bool) -> None:
    index = torch.tensor([4, 0, 2, 5], device=DEVICE) if rows else None
    count, total = (4, 7) if rows else (6, 6)
    weights = [draw(8, 24, grad=grad) for _ in range(2)]
    vectors = [[draw(size, grad=grad) for _ in range(2)] for size in (8, 24, 24)]
    arguments = (
        draw(total, 24, grad=grad),
        draw(total, 3, 2).abs(),
        8,
        weights,
        [] if grad else [part for weight in weights for part in weight.chunk(2)],
        *vectors,
        draw(total, 8, grad=grad),
        index,
        [0, 1, count],
        1e-5,
        "gelu",
        grad,
        not grad,
    )
    torch.library.opcheck(OPS.triton_expert_linear.default, arguments)
    if grad:
        x, _, _, weights, _, *vectors, _, index, bounds, eps, _, _, _ = arguments
        z = draw(total, 8)
        backward = (draw(total, 8), x, weights, *vectors, z, index, bounds, eps)
        torch.library.opcheck(OPS.triton_expert_linear_backward.default, detached(backward))


@pytest.mark.parametrize(
    ("grad", "selected"), [pytest.param(False, False, marks=pytest.mark.full), (True, True)]
)
def test_opcheck_shared_attention(grad: bool, selected: bool) -> None:
    layout = TokenLayout.from_lengths((5, 0), (2, 3), DEVICE)
    q, k, v = (draw(layout.num_rows, 16, grad=grad) for _ in range(3))
    chosen: tuple[Any, ...] = (None,) * 4 + (layout.longest,) * 2
    if selected:
        rows, own = layout.select("first", "all")
        q = draw(len(rows), 16, grad=grad)
        chosen = (own.cu_vision, own.cu_text, own.positions)
        valid = torch.tensor([True, False, True, True, False], device=DEVICE)
        chosen += (valid, layout.longest, own.longest)
    arguments = (q, k, v, layout.cu_vision, layout.cu_text, *chosen, 2, 0.3, "seq2seq", selected)
    torch.library.opcheck(OPS.triton_shared_attention.default, arguments)


def test_opcheck_masked_linear_cross_entropy() -> None:
    own = (draw(9, 24, grad=True), draw(13, 24, grad=True), draw(13, grad=True))
    index = (torch.randperm(9, device=DEVICE)[:5], torch.randint(13, (5,), device=DEVICE))
    torch.library.opcheck(OPS.triton_masked_linear_cross_entropy.default, (*own, *index, 0.1))
    peaks = torch.rand(5, 2, device=DEVICE) + 1
    backward = (draw(5), *detached(own), *index, peaks, 0.1)
    torch.library.opcheck(OPS.triton_masked_linear_cross_entropy_backward.default, backward)


def test_one_graph_and_the_same_numbers_under_torch_compile() -> None:
    """Two linears around an attention, forward and backward, with no break; statistics go from op to op."""
    layout = TokenLayout.from_lengths((5, 3), (2, 4), DEVICE)
    bounds = layout.expert_bounds("AB")
    first, last = ([draw(size, 16, grad=True) for _ in range(2)] for size in (48, 16))
    norm = Norm([draw(16) for _ in range(2)], [draw(16) for _ in range(2)])

    def block(x: Tensor) -> Tensor:
        qkv = expert_linear(x, first, bounds=bounds, norm=norm, impl="triton")
        q, k, v = qkv.chunk(3, dim=1)
        options: dict[str, Any] = {"num_heads": 2, "mask": "seq2seq", "impl": "triton"}
        o = measured_shared_attention(q, k, v, layout, **options)
        y = measured_expert_linear(o, last, bounds=bounds, norm=norm, impl="triton")
        return expert_linear(y, last, bounds=bounds, norm=norm, impl="triton")

    def run(call: Any, x: Tensor) -> list[Tensor]:
        y = call(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *first, *last])]

    x = draw(layout.num_rows, 16, grad=True)
    expected = run(block, x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(run(compiled, x), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
