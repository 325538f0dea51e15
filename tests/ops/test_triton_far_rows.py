"""The Triton kernels on rows that lie further than 2^31 numbers from the first one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import Norm, expert_linear, masked_linear_cross_entropy, shared_attention

ROWS, WIDTH, APART = 9, 64, 1 << 28
Call = Callable[..., Tensor]


@pytest.fixture(scope="module")
def memory() -> Tensor:
    """4.5 GiB, of which only the pages that are written take room."""
    return torch.empty(ROWS * APART, dtype=torch.float16, device=DEVICE)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    norm = Norm([weight[0]], [weight[1]])
    return expert_linear(
        x, [weight], [weight[2]], bounds=(0, ROWS), norm=norm, residual=x, impl="triton"
    )


def named_rows(x: Tensor, weight: Tensor) -> Tensor:
    rows = torch.arange(ROWS - 1, -1, -1, device=x.device)
    return expert_linear(x, [weight], bounds=(0, ROWS), rows=rows, impl="triton")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    layout = TokenLayout.from_lengths([5], [4], q.device)
    return shared_attention(q, k, v, layout, num_heads=1, mask="seq2seq", impl="triton")


def head(x: Tensor, weight: Tensor) -> Tensor:
    rows = torch.arange(ROWS, device=x.device)
    return masked_linear_cross_entropy(x, weight, None, rows, rows, reduction="none", impl="triton")


def with_gradients(call: Call, operands: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in operands]
    y = call(*leaves)
    return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]


@pytest.mark.parametrize(
    ("call", "far", "near"),
    [(linear, 1, 1), (named_rows, 1, 1), (attention, 3, 0), (head, 1, 1)],
    ids=lambda own: getattr(own, "__name__", ""),
)
def test_far_rows_are_as_near_ones(call: Call, far: int, near: int, memory: Tensor) -> None:
    draw = torch.Generator().manual_seed(0)
    operands = [
        torch.randn(rows, WIDTH, generator=draw).to(DEVICE, torch.float16)
        for rows in [ROWS] * far + [WIDTH] * near
    ]
    apart = [
        memory.as_strided((ROWS, WIDTH), (APART, 1), 4096 * place).copy_(own)
        for place, own in enumerate(operands[:far])
    ]
    ours = with_gradients(call, [*apart, *operands[far:]])
    assert all(map(torch.equal, ours, with_gradients(call, operands)))
