"""Two runs of the CUDA kernels give the same bits, whatever the order in which their blocks ran: a GPU's matter."""

from __future__ import annotations

import pytest
import torch
from attention_cases import MASKS
from cuda_cases import DEVICE
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import Norm, cuda_kernels, expert_linear, shared_attention

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
