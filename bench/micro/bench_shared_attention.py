"""shared_attention alone: python -m pytest bench/micro/bench_shared_attention.py

One layer's attention of base at 224 pixels, batch 8, as the encoder calls it, and PyTorch's own attention
on padded tensors with a key mask, which is what a runtime without packed rows can do at best.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import shared_attention

from .conftest import Timed

Call = Callable[[], Tensor]
WIDTH, HEADS = 768, 12
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CAPTIONS = [18, 8, 32, 11, 21, 17, 27, 23]
BATCHES = {
    "image": ([197] * 8, [0] * 8, "bidirectional"),
    "pair": ([197] * 8, CAPTIONS, "bidirectional"),
    "caption": ([197] * 8, CAPTIONS, "seq2seq"),
    "text": ([0] * 8, CAPTIONS, "bidirectional"),
}


def padded_attention(dtype: torch.dtype, vision: list[int], texts: list[int]) -> Call:
    """scaled_dot_product_attention over padded rows; padding them is not timed."""
    batch, tokens = len(texts), max(vision) + max(texts)
    q, k, v = (
        torch.randn(batch, tokens, 3 * WIDTH, generator=torch.Generator().manual_seed(0))
        .to(dtype)
        .view(batch, tokens, 3, HEADS, WIDTH // HEADS)
        .permute(2, 0, 3, 1, 4)
    )
    lengths = torch.tensor(vision) + torch.tensor(texts)
    real = (torch.arange(tokens) < lengths[:, None])[:, None, None, :]
    mask = None if bool(real.all()) else real
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("impl", ["auto", "cpu", "composite", "padded PyTorch"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_attention(timed: Timed, dtype: str, batch: str, impl: str) -> None:
    vision, texts, mask = BATCHES[batch]
    group = f"shared_attention {batch} {dtype}"
    layout = TokenLayout.from_lengths(vision, texts)
    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(layout.num_rows, 3 * WIDTH, generator=gen).to(DTYPES[dtype])
    q, k, v = qkv.split(WIDTH, dim=1)
    seen = [
        n * n + t * n + t * (t + 1) // 2 if mask == "seq2seq" else (n + t) ** 2
        for n, t in zip(vision, texts, strict=True)
    ]
    flops = 4.0 * WIDTH * sum(seen)
    if impl == "padded PyTorch":
        if mask != "bidirectional":
            pytest.skip("the padded peer is made for the bidirectional mask")
        timed(group, flops, padded_attention(DTYPES[dtype], vision, texts))
        return
    timed(
        group,
        flops,
        lambda: shared_attention(q, k, v, layout, num_heads=HEADS, mask=mask, impl=impl),
    )
