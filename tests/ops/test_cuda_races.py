"""Two runs of the CUDA kernels give the same bits, whatever the order in which their blocks ran: a GPU's matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    measured_expert_linear,
    measured_shared_attention,
    shared_attention,
)
from beit3_fast.ops.packed_weight import quantize_float8

pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu", reason=f"cuda: it {cuda_kernels.why_unavailable('cuda')}"),
    pytest.mark.timeout(500),
]
REPEATS = 250


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(torch.bfloat16)


def layout_of(tokens: int) -> TokenLayout:
    batch = 12_000 // tokens
    return TokenLayout.from_lengths([tokens] * batch, [b % 13 for b in range(batch)], DEVICE)


@torch.no_grad()
def expect_the_same_bits(run: Callable[[], list[Tensor]]) -> None:
    first = run()
    assert not any(bool(t.isnan().any()) for t in first)
    for _ in range(REPEATS - 1):
        for mine, expected in zip(run(), first, strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("tokens", [197, 577])
@pytest.mark.parametrize("mask", MASKS)
def test_the_same_bits_every_time(mask: str, tokens: int) -> None:
    layout = layout_of(tokens)
    bounds = layout.expert_bounds("AB")
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

    expect_the_same_bits(run)


def test_the_same_bits_where_blocks_split_k() -> None:
    """Four blocks a tile, and two where there are more tiles."""
    x, residual = draw(197, 3072), draw(197, 768)
    weight, wide = [draw(768, 3072) / 55], [draw(1280, 3072) / 55]
    rows = torch.randperm(197, device=DEVICE)
    given: dict[str, Any] = {"bounds": (0, 197), "impl": "cuda"}

    def run() -> list[Tensor]:
        own = measured_expert_linear(x, weight, residual=residual, **given)
        assert own.parts is not None
        gathered = expert_linear(x, weight, rows=rows, **given)
        return [own.rows, own.parts, gathered, expert_linear(x, wide, activation="gelu", **given)]

    expect_the_same_bits(run)


@pytest.mark.parametrize("tokens", [197, 577])
def test_the_same_8_bits_every_time(tokens: int) -> None:
    """Product, attention and product of a layer, by the scales and in the 8 bits that each op leaves for the next."""
    if (obstacle := cuda_kernels.float8_obstacle()) is not None:
        pytest.skip(f"cuda: it {obstacle}")
    layout = layout_of(tokens)
    x = draw(layout.num_rows, 768)
    to_qkv, to_out = (quantize_float8(draw(out, 768) / 28) for out in (3 * 768, 768))
    norm = Norm([torch.ones_like(x[0])], [draw(768)])
    given: dict[str, Any] = {"bounds": (0, layout.num_rows), "impl": "cuda"}

    def run() -> list[Tensor]:
        qkv = measured_expert_linear(x, [to_qkv], norm=norm, leaves="scales", **given)
        assert qkv.scales is not None
        *places, scales = *qkv.rows.chunk(3, dim=1), qkv.scales[:, -6:]
        o = measured_shared_attention(*places, layout, num_heads=12, impl="cuda", v_scales=scales)
        y = measured_expert_linear(o, [to_out], residual=x, **given)
        left = [t for own in (o, y) if own.rounded is not None for t in own.rounded]
        return [qkv.rows, qkv.scales, y.rows, *(t.view(torch.uint8) for t in left)]

    expect_the_same_bits(run)


def test_the_same_words_every_time() -> None:
    """The attention and the head of captioning steps, with keys that the step itself brings."""
    q, (k, v), rows = draw(64, 6, 768), draw(2, 64, 961, 768), draw(2, 64, 6, 768)
    seen = torch.rand(64, 6, 60, device=DEVICE) > 0.5
    weight, bias, x = draw(64010, 768) / 28, draw(64010), draw(192, 768)
    place = torch.tensor([950], device=DEVICE)

    def run() -> list[Tensor]:
        new = NewKeys(*rows, place)
        o = cached_attention(q, k, v, seen, num_heads=12, front=901, new=new, impl="cuda")
        return [o, *head_top_k(x, weight, bias, 9, impl="cuda")]

    expect_the_same_bits(run)
