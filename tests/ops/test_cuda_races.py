"""Two runs of the CUDA kernels give the same bits, whatever the order in which their blocks ran: a GPU's matter."""

from __future__ import annotations

import pytest
import torch
from attention_cases import MASKS
from cuda_cases import DEVICE
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import (
    NewKeys,
    Norm,
    cached_attention,
    cuda_kernels,
    expert_linear,
    head_top_k,
    shared_attention,
)

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu", reason=f"cuda: it {cuda_kernels.why_unavailable('cuda')}"
)
REPEATS = 250


@pytest.mark.timeout(500)
@pytest.mark.parametrize("tokens", [197, 577])
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_the_same_bits_every_time(mask: str, tokens: int) -> None:
    batch = 12_000 // tokens
    layout = TokenLayout.from_lengths([tokens] * batch, [b % 13 for b in range(batch)], DEVICE)
    bounds = layout.expert_bounds("AB")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(torch.bfloat16)

    x = draw(layout.num_rows, 768)
    weights = [draw(3 * 768, 768) / 28 for _ in range(2)]
    norm = Norm([draw(768), draw(768)], [draw(768), draw(768)])
    rows = torch.randperm(layout.num_rows, device=DEVICE)

    def run() -> list[Tensor]:
        gathered = expert_linear(x, weights, bounds=bounds, rows=rows, impl="cuda")
        qkv = expert_linear(x, weights, bounds=bounds, norm=norm, activation="gelu", impl="cuda")
        q, k, v = qkv.chunk(3, dim=1)
        o = shared_attention(q, k, v, layout, num_heads=12, mask=mask, impl="cuda")
        return [gathered, qkv, o]

    first = run()
    assert not any(bool(t.isnan().any()) for t in first)
    for _ in range(REPEATS - 1):
        for mine, expected in zip(run(), first, strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.timeout(500)
@torch.no_grad()
def test_the_same_words_every_time() -> None:
    """The attention and the head of captioning steps, with keys that the step itself brings."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(torch.bfloat16)

    q, (k, v), rows = draw(64, 6, 768), draw(2, 64, 961, 768), draw(2, 64, 6, 768)
    seen = torch.rand(64, 6, 60, device=DEVICE) > 0.5
    weight, bias, x = draw(64010, 768) / 28, draw(64010), draw(192, 768)
    place = torch.tensor([950], device=DEVICE)

    def run() -> list[Tensor]:
        new = NewKeys(*rows, place)
        o = cached_attention(q, k, v, seen, num_heads=12, front=901, new=new, impl="cuda")
        return [o, *head_top_k(x, weight, bias, 9, impl="cuda")]

    first = run()
    assert not any(bool(t.isnan().any()) for t in first)
    for _ in range(REPEATS - 1):
        for mine, expected in zip(run(), first, strict=True):
            assert torch.equal(mine, expected)
