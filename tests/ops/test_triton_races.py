"""Two runs give the same bits: 250 repeats over many samples on a GPU, two over few in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import MASKS
from op_cases import DTYPES
from torch import Tensor
from triton_cases import DEVICE, TARGETS

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import Norm, expert_linear, masked_linear_cross_entropy, shared_attention

REPEATS, BATCH, TOKENS = (250, 60, 197) if DEVICE == "cuda" else (2, 2, 13)
DTYPE = DTYPES[TARGETS[-1][1]]


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "mask", [m if m == "causal" else pytest.param(m, marks=pytest.mark.full) for m in MASKS]
)
def test_the_same_bits_every_time(mask: str) -> None:
    layout = TokenLayout.from_lengths([TOKENS] * BATCH, [b % 13 for b in range(BATCH)], DEVICE)
    bounds = layout.expert_bounds("AB")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(DTYPE).requires_grad_()

    x, width = draw(layout.num_rows, 128), 3 * 128
    weights = [(torch.randn(width, 128, device=DEVICE) / 11).to(DTYPE) for _ in range(2)]
    weights = [weight.requires_grad_() for weight in weights]
    norm = Norm([draw(128), draw(128)], [draw(128), draw(128)])
    leaves = [x, *weights, *norm.weights, *norm.biases]

    def run() -> list[Tensor]:
        options: dict[str, Any] = {"norm": norm, "activation": "gelu", "impl": "triton"}
        qkv = expert_linear(x, weights, bounds=bounds, **options)
        q, k, v = qkv.chunk(3, dim=1)
        o = shared_attention(q, k, v, layout, num_heads=2, mask=mask, impl="triton")
        own = torch.autograd.grad(o.float().square().sum(), [q, k, v], retain_graph=True)
        return [qkv, o, *own, *torch.autograd.grad(o.float().square().sum(), leaves)]

    first = run()
    for _ in range(REPEATS - 1):
        for mine, expected in zip(run(), first, strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.timeout(500)
def test_the_same_bits_of_a_head_every_time() -> None:
    count, classes = 40 * BATCH, 5 * TOKENS
    x, weight = (torch.randn(n, 128, device=DEVICE).to(DTYPE) for n in (2 * count, classes))
    own = [x.requires_grad_(), weight.requires_grad_()]
    rows = torch.randperm(2 * count, device=DEVICE)[:count]
    targets = torch.randint(classes, (count,), device=DEVICE)

    def run() -> list[Tensor]:
        loss = masked_linear_cross_entropy(*own, None, rows, targets, impl="triton")
        return [loss, *torch.autograd.grad(loss, own)]

    first = run()
    for _ in range(REPEATS - 1):
        for mine, expected in zip(run(), first, strict=True):
            assert torch.equal(mine, expected)
