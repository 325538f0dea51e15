"""Rows around the products: python -m pytest bench/micro/bench_rows.py

The last LayerNorm of eight images with a caption each at base width, and their way back to padded rows; in
front of fc2, whose rows are the widest, the gradients of LayerNorm and the transposing of a gradient.
"""

from __future__ import annotations

import pytest
import torch

from beit3_fast.composite.expert_linear import PLAIN
from beit3_fast.ops import ExpertNorm, expert_layer_norm, library, unpack_rows
from beit3_fast.ops.cpu_kernels import GRADIENTS

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


@pytest.mark.parametrize("how", ["ours", "plain PyTorch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_gradients(timed: Timed, dtype: str, how: str) -> None:
    _need_the_library(how)
    grad, x = (torch.randn(VISION, 4 * WIDTH).to(DTYPES[dtype]) for _ in range(2))
    weight, bias = (torch.randn(4 * WIDTH).to(DTYPES[dtype]) for _ in range(2))
    _, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, 1e-5)
    gradients = (GRADIENTS if how == "ours" else PLAIN).layer_norm
    flops = 16.0 * x.numel()
    timed(
        f"norm gradients {dtype}",
        flops,
        lambda: gradients(grad, x, weight, bias, mean, rstd, 1e-5)[0],
    )


@pytest.mark.parametrize("how", ["ours", "plain PyTorch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed(timed: Timed, dtype: str, how: str) -> None:
    _need_the_library(how)
    x = torch.randn(VISION, 4 * WIDTH).to(DTYPES[dtype])
    calls = {
        "ours": lambda: torch.ops.beit3_fast.transposed(x),
        "plain PyTorch": lambda: x.T.contiguous(),
    }
    timed(f"transposed {dtype}", float(x.numel()), calls[how])


def _need_the_library(how: str) -> None:
    if how != "ours":
        return
    if not library.available():
        pytest.skip(f"needs the compiled library, which {library.why_unavailable()}")
    library.load()
