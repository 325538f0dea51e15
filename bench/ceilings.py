"""What this machine can do at most, measured in the same run as the runtimes.

The rate of the fastest matrix product known here, PyTorch's or our own, on random data (zeros clock higher), and
the rate of a copy that no cache holds: what software reaches, not what the data sheet says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.model.work import Product, Work
from beit3_fast.ops import expert_linear, library
from beit3_fast.timing import Effort
from bench.events import timed_rounds

# (rows, in, out): eight images of 197 tokens through the projections of base and large, and one
# square product, which some libraries run faster than any of them.
MATMUL_SHAPES = (
    (1576, 768, 2304),
    (1576, 768, 3072),
    (1576, 3072, 768),
    (1576, 1024, 4096),
    (2048, 2048, 2048),
)
# The products of 256 images, and the square one that GPUs are named after.
GPU_MATMUL_SHAPES = (
    (50_432, 768, 3072),
    (50_432, 3072, 768),
    (50_432, 1024, 4096),
    (50_432, 4096, 1024),
    (8192, 8192, 8192),
)
_COPY_BYTES = 256 << 20
# Bytes of a row: what a tile of at most 32 rows and its columns take, 32 KB, stays in the first cache.
_TILE_DEPTH = 512


def measure_ceilings(
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    seconds: float = 0.25,
) -> dict[str, Any]:
    """The JSON contract's "ceilings": TFLOP/s for each dtype, copied GB/s (read plus written), tile loops.

    Each shape runs for about `seconds`; the fastest call of the fastest shape counts, since whatever
    else runs on the machine only ever slows a call down.
    """
    rates, tile_loop = {}, {}
    for dtype in dtypes:
        if device.type == "cpu":
            tile_loop[str(dtype).removeprefix("torch.")] = measure_tile_loop(dtype, seconds)
        best = 0.0
        for rows, width, out in GPU_MATMUL_SHAPES if device.type == "cuda" else MATMUL_SHAPES:
            x = torch.randn(rows, width).to(device, dtype)
            w = torch.randn(out, width).to(device, dtype)
            for product in (partial(F.linear, x, w), partial(_our_product, x, w)):
                took = _fastest(product, seconds, device)
                best = max(best, 2 * rows * width * out / took)
        rates[str(dtype).removeprefix("torch.")] = float(f"{best / 1e12:.4g}")
    source = torch.randint(0, 255, (_COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = _fastest(lambda: target.copy_(source), seconds, device)
    return {
        "matmul_tflops": rates,
        "copy_gbps": round(2 * _COPY_BYTES / took / 1e9, 2),
        "tile_loop_tflops": tile_loop,
    }


def _our_product(x: Tensor, w: Tensor) -> Tensor:
    return expert_linear(x, [w], bounds=(0, len(x)))


def _fastest(call: Callable[[], object], seconds: float, device: torch.device) -> float:
    if device.type == "cuda":
        with torch.inference_mode():
            effort = Effort(warmup=2, rounds=4, seconds=seconds, most=500)
            return min(timed_rounds({"": call}, effort, device)[""])
    samples: list[float] = []
    with torch.inference_mode():
        start = time.perf_counter()
        call()
        first = time.perf_counter() - start
        if first > 1:
            # The CPU has no instructions for the dtype: the benefit of a warm call is nothing beside that.
            return first
        start = time.perf_counter()
        while len(samples) < 4 or time.perf_counter() - start < seconds:
            before = time.perf_counter()
            call()
            samples.append(time.perf_counter() - before)
    return min(samples)


def measure_tile_loop(dtype: torch.dtype, seconds: float) -> float | None:
    """TFLOP/s of the innermost loop of our CPU kernels alone, on random data in the nearest cache, on all threads.

    None without the compiled library, or for a dtype that it does not take.
    """
    if not library.available() or dtype not in (torch.float32, torch.bfloat16):
        return None
    ops = torch.ops.beit3_fast
    depth = _TILE_DEPTH // dtype.itemsize
    x, weight = (torch.randn(rows, depth).to(dtype) for rows in (32, 64))
    packed = ops.pack_weight(weight)
    repeats, best, start = 100, 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        done = ops.product_loop(x, packed, repeats)
        took = time.perf_counter() - before
        best = max(best, done / took)
        if took < 0.005:
            repeats *= 2
    return float(f"{best / 1e12:.4g}")


class BareProducts(nn.Module):
    """Nothing but the products of some work, in the faster of oneDNN with packed weights and F.linear.

    A runtime that calls a library for its products, however well it does the rest, ends here. Each product
    has weights of its own, as in the model, so that they come from memory as often as there.
    """

    def __init__(self, work: Work, dtype: torch.dtype) -> None:
        super().__init__()
        self._calls: list[Callable[[], Tensor]] = []
        for product in work.products:
            x = torch.randn(product.rows, product.width).to(dtype)
            make = _fastest_linear(product, x)
            self._calls += [
                partial(make(_random_weight(product, dtype)), x) for _ in range(product.times)
            ]

    @torch.inference_mode()
    def forward(self) -> None:
        """Runs every product once and drops the results."""
        for call in self._calls:
            call()


def _random_weight(product: Product, dtype: torch.dtype) -> Tensor:
    return torch.randn(product.out, product.width).to(dtype)


def _plain_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight)


def _packed_linear(rows: int, weight: Tensor) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    call = torch.ops.mkldnn._linear_pointwise
    return lambda x: call(x, packed, None, "none", [], "")


def _fastest_linear(product: Product, x: Tensor) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """What turns a weight into the call that runs this shape in the least time."""
    ways: list[Callable[[Tensor], Callable[[Tensor], Tensor]]] = [
        _plain_linear,
        partial(_packed_linear, product.rows),
    ]
    weight = _random_weight(product, x.dtype)
    best, least = ways[0], math.inf
    for way in ways:
        try:
            took = _fastest(partial(way(weight), x), 0.0, x.device)
        except (NotImplementedError, RuntimeError):
            # oneDNN does not have every dtype on every CPU.
            continue
        if took < least:
            best, least = way, took
    return best
