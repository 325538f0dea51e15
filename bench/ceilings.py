"""What this machine can do at most, measured in the same run as the runtimes.

The rate of the fastest matrix product known here, PyTorch's or our own, on random data (zeros clock higher), and
the rate of a copy that no cache holds: what software reaches, not what the data sheet says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.model.work import Product, Work
from beit3_fast.ops import expert_linear, library
from beit3_fast.ops.operands import Norm
from beit3_fast.ops.packed_weight import quantize
from beit3_fast.timing import Effort, interleave, quantiles, speed_ups
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
# fc1 of base on the same images.
_FC1_SHAPE = (1576, 768, 3072)
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

    int8 has products on CPUs alone: ours, which round the rows on the way, and oneDNN's on rows that are rounded already.
    Beside the ceilings, expert_linear as the model calls it for fc1, as a fraction of the tile loop in turn with it.
    Each shape runs for about `seconds`; the fastest call of the fastest shape counts, since whatever
    else runs on the machine only ever slows a call down.
    """
    rates, tile_loop, fc1 = {}, {}, {}
    for dtype in dtypes:
        if device.type == "cpu":
            name = str(dtype).removeprefix("torch.")
            loop = tile_loop_of(dtype)
            tile_loop[name] = loop and measure_tile_loop(loop, seconds)
            if loop:
                fc1[name] = measure_fc1(dtype, loop, seconds)
        best = 0.0
        for rows, width, out in GPU_MATMUL_SHAPES if device.type == "cuda" else MATMUL_SHAPES:
            for product in _products(rows, width, out, dtype, device):
                took = _fastest(product, seconds, device)
                best = max(best, 2 * rows * width * out / took)
        if best:
            rates[str(dtype).removeprefix("torch.")] = float(f"{best / 1e12:.4g}")
    source = torch.randint(0, 255, (_COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = _fastest(lambda: target.copy_(source), seconds, device)
    return {
        "matmul_tflops": rates,
        "copy_gbps": round(2 * _COPY_BYTES / took / 1e9, 2),
        "tile_loop_tflops": tile_loop,
        "expert_linear_fc1": fc1,
    }


def _products(
    rows: int, width: int, out: int, dtype: torch.dtype, device: torch.device
) -> list[Callable[[], Tensor]]:
    """The ways of one product on random data."""
    if dtype is torch.int8:
        product = Product(rows, width, out)
        calls: list[Callable[[], Tensor]] = []
        if onednn_multiplies(dtype):
            linear = _int8_linear(_random(out, width, dtype))
            calls.append(partial(linear, _random_rows(product)))
        if library.available():
            x = torch.randn(rows, width)
            calls.append(partial(_our_product, x, quantize(torch.randn(out, width), x.dtype)))
        return calls
    x, w = (_random(n, width, dtype).to(device) for n in (rows, out))
    return [partial(F.linear, x, w), partial(_our_product, x, w)]


def _fc1(dtype: torch.dtype) -> Callable[[], Tensor]:
    """expert_linear with LayerNorm, bias and GELU; rows beside int8 weights are bfloat16, as in an int8 model."""
    rows, width, out = _FC1_SHAPE
    own = torch.bfloat16 if dtype is torch.int8 else dtype
    x, w, scale, shift = (torch.randn(n, width).to(own) for n in (rows, out, 1, 1))
    weights = [quantize(w, own) if dtype is torch.int8 else w]
    return partial(
        expert_linear,
        x,
        weights,
        [torch.randn(out).to(own)],
        bounds=(0, rows),
        norm=Norm([scale[0]], [shift[0]]),
        activation="gelu",
    )


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


TileLoop = Callable[[int], int]


def tile_loop_of(dtype: torch.dtype) -> TileLoop | None:
    """The innermost loop of our CPU kernels alone, on random data in the nearest cache, on all threads: so many repeats of it,
    which return how many operations they were.

    None without the compiled library, or for a dtype that it does not take.
    """
    if not library.available() or dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return None
    ops = torch.ops.beit3_fast
    depth = _TILE_DEPTH // dtype.itemsize
    # Rows become int8 before the loop begins.
    rows_dtype = torch.float32 if dtype is torch.int8 else dtype
    x, weight = (torch.randn(rows, depth).to(rows_dtype) for rows in (32, 64))
    packed = ops.quantize_weight(weight) if dtype is torch.int8 else ops.pack_weight(weight)
    return partial(ops.product_loop, x, packed)


def measure_tile_loop(loop: TileLoop, seconds: float) -> float:
    """TFLOP/s of its fastest call."""
    repeats, best, start = 100, 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        done = loop(repeats)
        took = time.perf_counter() - before
        best = max(best, done / took)
        if took < 0.005:
            repeats *= 2
    return float(f"{best / 1e12:.4g}")


def measure_fc1(dtype: torch.dtype, loop: TileLoop, seconds: float) -> dict[str, float]:
    """expert_linear as fc1 and as many operations of the tile loop in turn: TFLOP/s, and the fraction of the loop's; medians."""
    operations = 2 * math.prod(_FC1_SHAPE)
    repeats = max(1, round(100 * operations / loop(100)))
    calls: dict[str, Callable[[], object]] = {"fc1": _fc1(dtype), "loop": partial(loop, repeats)}
    with torch.inference_mode():
        samples = interleave(calls, Effort(warmup=2, rounds=5, seconds=2 * seconds, most=500))
    share = loop(repeats) / operations
    return {
        "tflops": float(f"{operations / quantiles(samples['fc1']).p50 / 1e12:.4g}"),
        "tile_loop_fraction": float(
            f"{speed_ups(samples['fc1'], samples['loop']).p50 / share:.4g}"
        ),
    }


class BareProducts(nn.Module):
    """Nothing but the products of some work, in the faster of oneDNN with packed weights and F.linear.

    A runtime that calls a library for its products, however well it does the rest, ends here. Each product
    has weights of its own, as in the model, so that they come from memory as often as there. int8 is oneDNN's product
    of rows that are rounded already, with a result in fp32.
    """

    def __init__(self, work: Work, dtype: torch.dtype) -> None:
        super().__init__()
        self._calls: list[Callable[[], Tensor]] = []
        int8 = dtype is torch.int8
        for product in work.products:
            x = _random_rows(product) if int8 else _random(product.rows, product.width, dtype)
            make = _int8_linear if int8 else _fastest_linear(product, x)
            self._calls += [
                partial(make(_random(product.out, product.width, dtype)), x)
                for _ in range(product.times)
            ]

    @torch.inference_mode()
    def forward(self) -> None:
        """Runs every product once and drops the results."""
        for call in self._calls:
            call()


def _random(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    if dtype is torch.int8:
        return torch.randint(-127, 128, (rows, width), dtype=dtype)
    return torch.randn(rows, width).to(dtype)


def _random_rows(product: Product) -> Tensor:
    """Rows for int8 products: uint8, which is what VNNI multiplies by int8; oneDNN corrects for signed ones."""
    return torch.randint(0, 256, (product.rows, product.width), dtype=torch.uint8)


def _int8_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)
    call = torch.ops.onednn.qlinear_pointwise
    return lambda x: call(
        x, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@cache
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether BareProducts can run in a dtype: int8 is not there on every CPU and in every build of PyTorch."""
    if dtype is not torch.int8:
        return True
    product = Product(rows=4, width=32, out=16)
    try:
        _int8_linear(_random(product.out, product.width, dtype))(_random_rows(product))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


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
    weight = _random(product.out, product.width, x.dtype)
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
