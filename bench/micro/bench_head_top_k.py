"""head_top_k, and its choice alone: python -m pytest bench/micro/bench_head_top_k.py

The next words of 24 captions, six of each among base's 64,010, beside PyTorch's own calls.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.composite.head_top_k import likeliest
from beit3_fast.ops import head_top_k
from beit3_fast.ops.head_top_k import compiled_likeliest

from .conftest import Timed

WIDTH, CLASSES, COUNT = 768, 64_010, 6
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize("impl", ["auto", "plain PyTorch"])
@pytest.mark.parametrize("rows", [3, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_top_k(timed: Timed, dtype: str, rows: int, impl: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=draw).mul(scale).to(DTYPES[dtype])
        for shape, scale in (((rows, WIDTH), 1.0), ((CLASSES, WIDTH), 0.03))
    )

    def call() -> Tensor:
        if impl == "plain PyTorch":
            return F.linear(x, weight).float().log_softmax(1).topk(COUNT).values
        return head_top_k(x, weight, None, COUNT, impl=impl)[0]

    timed(f"head_top_k {rows} rows {dtype}", 2.0 * rows * WIDTH * CLASSES, call)


@pytest.mark.parametrize("impl", ["cpu", "composite"])
@pytest.mark.parametrize("rows", [3, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_choice(timed: Timed, dtype: str, rows: int, impl: str) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, CLASSES, generator=draw).mul(3).to(DTYPES[dtype])
    allowed = torch.rand(CLASSES, generator=draw) < 0.9
    choose = compiled_likeliest if impl == "cpu" else likeliest
    timed(
        f"choice {rows} rows {dtype}",
        1.0 * rows * CLASSES,
        lambda: choose(logits, COUNT, allowed)[0],
    )
