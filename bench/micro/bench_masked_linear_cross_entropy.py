"""masked_linear_cross_entropy alone: python -m pytest bench/micro/bench_masked_linear_cross_entropy.py

The loss of base's word head on the masked words of eight captions, and of its visual head on the masked patches of
one image, forward and backward, beside PyTorch's own calls, which keep all logits.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.ops import masked_linear_cross_entropy

from .conftest import Timed

WIDTH = 768
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS = {"words": (64_010, 40), "visual tokens": (8_192, 78)}


@pytest.mark.parametrize("impl", ["auto", "plain PyTorch"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_linear_cross_entropy(timed: Timed, dtype: str, head: str, impl: str) -> None:
    vocabulary, count = HEADS[head]
    gen = torch.Generator().manual_seed(0)
    rows = torch.randperm(8 * count, generator=gen)[:count]
    targets = torch.randint(vocabulary, (count,), generator=gen)
    operands = [
        torch.randn(shape, generator=gen).mul(scale).to(DTYPES[dtype]).requires_grad_()
        for shape, scale in (((8 * count, WIDTH), 1.0), ((vocabulary, WIDTH), 0.03))
    ]

    @torch.inference_mode(False)
    def step() -> Tensor:
        x, weight = operands
        if impl == "plain PyTorch":
            loss = F.cross_entropy(F.linear(x[rows], weight).float(), targets)
        else:
            loss = masked_linear_cross_entropy(x, weight, None, rows, targets, impl=impl)
        return torch.autograd.grad(loss, operands)[0]

    products = 3 if impl == "plain PyTorch" else 4
    flops = products * 2.0 * count * vocabulary * WIDTH
    timed(f"masked_linear_cross_entropy {head} {dtype}", flops, step)
