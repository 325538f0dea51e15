"""Rows behind the layers: python -m pytest bench/micro/bench_rows.py

The last LayerNorm of eight images with a caption each at base width, and their way back to padded rows.
"""

from __future__ import annotations

import pytest
import torch

from beit3_fast.ops import ExpertNorm, expert_layer_norm, unpack_rows

from .conftest import Timed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VISION, TEXT, PADDED, WIDTH = 1576, 160, 8 * 229, 768


@pytest.mark.parametrize("impl", ["cpu", "composite"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_last_norm(timed: Timed, dtype: str, impl: str) -> None:
    x = torch.randn(VISION + TEXT, WIDTH).to(DTYPES[dtype])
    vectors = [torch.randn(WIDTH).to(DTYPES[dtype]) for _ in range(4)]
    norm = ExpertNorm(vectors[:2], vectors[2:], (1e-5, 1e-5), (0, VISION, VISION + TEXT))
    flops = 8.0 * x.numel()
    timed(f"last norm {dtype}", flops, lambda: expert_layer_norm(x, norm, impl=impl))


@pytest.mark.parametrize("how", ["ours", "plain PyTorch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack(timed: Timed, dtype: str, how: str) -> None:
    x = torch.randn(VISION + TEXT, WIDTH).to(DTYPES[dtype])
    places = torch.randperm(PADDED)[: len(x)].sort().values
    calls = {
        "ours": lambda: unpack_rows(x, places, PADDED),
        "plain PyTorch": lambda: x.new_zeros(PADDED, WIDTH).index_copy(0, places, x),
    }
    timed(f"unpack {dtype}", float(x.numel()), calls[how])
