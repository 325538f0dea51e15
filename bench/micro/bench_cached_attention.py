"""cached_attention alone: python -m pytest bench/micro/bench_cached_attention.py

One layer's attention of one captioning step of base at 480 pixels: three beams, each a word and a mask token, against
the 901 keys of their image and those of ten words. It is read from memory once: extra_info holds GB/s of keys and values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from beit3_fast.ops import cached_attention

from .conftest import Timed

WIDTH, HEADS, QUERIES, KEYS = 768, 12, 6, 901 + 10 * 6
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize("impl", ["auto", "cpu", "composite"])
@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_attention(timed: Timed, benchmark: Any, dtype: str, images: int, impl: str) -> None:
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(images, QUERIES, WIDTH, generator=gen).to(DTYPES[dtype])
    k, v = torch.randn(2, images, KEYS + 60, WIDTH, generator=gen).to(DTYPES[dtype])[:, :, :KEYS]
    seen = torch.ones(images, QUERIES, KEYS, dtype=torch.bool)
    timed(
        f"cached_attention {images} {dtype}",
        4.0 * images * QUERIES * KEYS * WIDTH,
        lambda: cached_attention(q, k, v, seen, num_heads=HEADS, impl=impl),
    )
    if benchmark.stats is not None:
        read = 2 * images * KEYS * WIDTH * q.element_size()
        benchmark.extra_info["gbps"] = round(read / benchmark.stats["median"] / 1e9, 2)
