"""shared_attention alone: python -m pytest bench/micro/bench_shared_attention.py

One layer's attention as the encoder calls it, of base at 224 pixels and batch 8 unless said, and PyTorch's own attention
on padded tensors with a key mask, which is what a runtime without packed rows can do at best; and one sample of more tokens
than any cache near a core holds. "any mask" is "caption" as a mask tensor. With its gradients, beside torchscale's two batched products with a softmax in fp32 between them.
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
WIDTHS = {
    "large": (1024, 16),
    "giant": (1408, 16),
}  # C and H of other models; giant's heads have 88 columns
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CAPTIONS = [18, 8, 32, 11, 21, 17, 27, 23]
BATCHES = {
    "image": ([197] * 8, [0] * 8, "bidirectional"),
    "pair": ([197] * 8, CAPTIONS, "bidirectional"),
    "caption": ([197] * 8, CAPTIONS, "seq2seq"),
    "text": ([0] * 8, CAPTIONS, "bidirectional"),
    "one image": ([197], [0], "bidirectional"),
    "words one by one": ([0] * 8, CAPTIONS, "causal"),
    "any mask": ([197] * 8, CAPTIONS, "any"),
    "vqa": ([901] * 8, CAPTIONS, "bidirectional"),
    "large": ([197] * 8, [0] * 8, "bidirectional"),
    "giant": ([197] * 8, [0] * 8, "bidirectional"),
    "long": ([5000], [0], "bidirectional"),
}


def seq2seq_tensor(tokens: int, words: int) -> Tensor:
    """What "seq2seq" lets a query see, bool [N, N]: of images so long and the words behind them."""
    seen = torch.ones(tokens + words, tokens + words, dtype=torch.bool)
    seen[:tokens, tokens:] = False
    seen[tokens:, tokens:] = torch.ones(words, words, dtype=torch.bool).tril()
    return seen


def padded_attention(
    dtype: torch.dtype, vision: list[int], texts: list[int], width: int, heads: int
) -> Call:
    """scaled_dot_product_attention over padded rows; padding them is not timed."""
    batch, tokens = len(texts), max(vision) + max(texts)
    q, k, v = (
        torch.randn(batch, tokens, 3 * width, generator=torch.Generator().manual_seed(0))
        .to(dtype)
        .view(batch, tokens, 3, heads, width // heads)
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
    width, heads = WIDTHS.get(batch, (WIDTH, HEADS))
    group = f"shared_attention {batch} {dtype}"
    layout = TokenLayout.from_lengths(vision, texts)
    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(layout.num_rows, 3 * width, generator=gen).to(DTYPES[dtype])
    q, k, v = qkv.split(width, dim=1)
    seen = [
        (n + t) ** 2 if mask == "bidirectional" else n * n + t * n + t * (t + 1) // 2
        for n, t in zip(vision, texts, strict=True)
    ]
    flops = 4.0 * width * sum(seen)
    if impl == "padded PyTorch":
        if mask != "bidirectional":
            pytest.skip("the padded peer is made for the bidirectional mask")
        timed(group, flops, padded_attention(DTYPES[dtype], vision, texts, width, heads))
        return
    may_see = seq2seq_tensor(max(vision), max(texts)) if mask == "any" else mask
    timed(
        group,
        flops,
        lambda: shared_attention(q, k, v, layout, num_heads=heads, mask=may_see, impl=impl),
    )


def batched_products(dtype: torch.dtype, vision: list[int], texts: list[int]) -> Call:
    """torchscale's attention on padded rows [B, N, C], forward and backward; padding them is not timed."""
    batch, tokens = len(texts), max(vision) + max(texts)
    gen = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, tokens, WIDTH, generator=gen).to(dtype).requires_grad_()
        for _ in range(3)
    )
    grad = torch.randn(batch, tokens, WIDTH, generator=gen).to(dtype)
    lengths = torch.tensor(vision) + torch.tensor(texts)
    padding = torch.arange(tokens) >= lengths[:, None]

    def heads(rows: Tensor) -> Tensor:
        own = rows.view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2)
        return own.reshape(batch * HEADS, tokens, WIDTH // HEADS)

    @torch.inference_mode(False)
    def call() -> Tensor:
        scores = torch.bmm(heads(q * (WIDTH // HEADS) ** -0.5), heads(k).transpose(1, 2))
        if bool(padding.any()):
            own = scores.view(batch, HEADS, tokens, tokens)
            scores = own.masked_fill(padding[:, None, None], float("-inf")).view_as(scores)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
        o = torch.bmm(weights, heads(v)).view(batch, HEADS, tokens, -1).transpose(1, 2)
        return torch.autograd.grad(o.reshape(batch, tokens, WIDTH), (q, k, v), grad)[0]

    return call


@pytest.mark.parametrize("impl", ["auto", "cpu", "composite", "batched products"])
@pytest.mark.parametrize("batch", ["image", "pair", "text"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(timed: Timed, dtype: str, batch: str, impl: str) -> None:
    vision, texts, mask = BATCHES[batch]
    group = f"shared_attention with gradients {batch} {dtype}"
    # Two products forward, five backward.
    flops = 7 * 2.0 * WIDTH * sum((n + t) ** 2 for n, t in zip(vision, texts, strict=True))
    if impl == "batched products":
        timed(group, flops, batched_products(DTYPES[dtype], vision, texts))
        return
    layout = TokenLayout.from_lengths(vision, texts)
    gen = torch.Generator().manual_seed(0)
    rows = torch.randn(layout.num_rows, 4 * WIDTH, generator=gen).to(DTYPES[dtype])
    *operands, grad = rows.split(WIDTH, dim=1)
    q, k, v = (t.contiguous().requires_grad_() for t in operands)

    @torch.inference_mode(False)
    def call() -> Tensor:
        o = shared_attention(q, k, v, layout, num_heads=HEADS, mask=mask, impl=impl)
        return torch.autograd.grad(o, (q, k, v), grad)[0]

    timed(group, flops, call)
