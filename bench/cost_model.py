"""What an op and a workload cost on a GPU at least: floating-point operations, bytes, and the time of the slower of the two.

A launch is counted as if every operand were read once and every result written once, and as if products and memory
overlapped perfectly: a floor, which no launch meets. Layers follow one another, so their floors add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from beit3_fast.config import BEiT3Config
from beit3_fast.errors import ConfigError
from beit3_fast.kernels import _tiles
from beit3_fast.model.work import Product, Work

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "int8": 1.0}


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second, and who says so.

    tflops: 10^12 operations of matrix products by dtype, dense, sums in fp32. gbps: 10^9 bytes of memory.
    """

    tflops: Mapping[str, float]
    gbps: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet, and the file of kernels/tiles/ that it takes."""

    name: str
    tiles: str
    rates: Rates


def _sheet(fp32: float, half: float, eighth: float | None, gbps: float, source: str) -> Rates:
    tflops = {"float32": fp32, "bfloat16": half, "float16": half}
    return Rates(tflops if eighth is None else tflops | {"float8": eighth}, gbps, source)


# Dense rates: half of what the sheets print "with sparsity". fp32 is that outside of the tensor cores.
GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(
        "A100 SXM 80 GB",
        "sm_80",
        _sheet(19.5, 312.0, None, 2039.0, "NVIDIA A100 Tensor Core GPU data sheet"),
    ),
    "h100": Gpu(
        "H100 SXM",
        "sm_90",
        _sheet(67.0, 989.4, 1978.9, 3350.0, "NVIDIA H100 Tensor Core GPU data sheet"),
    ),
    "h200": Gpu(
        "H200 SXM",
        "sm_90",
        _sheet(67.0, 989.4, 1978.9, 4800.0, "NVIDIA H200 Tensor Core GPU data sheet"),
    ),
    "b200": Gpu(
        "B200 (HGX, 1000 W)",
        "sm_100",
        _sheet(80.0, 2250.0, 4500.0, 8000.0, "NVIDIA Blackwell architecture technical brief"),
    ),
}


def gpu(name: str) -> Gpu:
    """A GPU by its short name. Raises ConfigError, with those that there are, for another."""
    if name not in GPUS:
        raise ConfigError(f"unknown GPU {name!r}; there are: {', '.join(GPUS)}")
    return GPUS[name]


def measured(ceilings: Mapping[str, Any], sheet: Rates | None = None) -> Rates | None:
    """The rates of a report's "ceilings", those of the sheet where nothing was measured; None without either.

    Raises ConfigError for a rate that is no number.
    """
    rates, gbps = ceilings.get("matmul_tflops", {}), ceilings.get("copy_gbps")
    if not isinstance(rates, Mapping):
        raise ConfigError(f"ceilings: matmul_tflops must be an object, got {rates!r}")
    for name, rate in (*rates.items(), ("copy_gbps", gbps)):
        if rate is not None and (type(rate) not in (int, float) or not 0 <= rate < math.inf):
            raise ConfigError(f"ceilings: {name} must be a positive number or null, got {rate!r}")
    tflops = {dtype: rate for dtype, rate in rates.items() if rate}
    if sheet is not None:
        source = sheet.source
        if tflops or gbps:
            seen = [*tflops, *(["memory"] if gbps else [])]
            source = f"{source}; measured: {', '.join(seen)}"
        return Rates({**sheet.tflops, **tflops}, gbps or sheet.gbps, source)
    return Rates(tflops, gbps, "measured in the same run") if tflops and gbps else None


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes read from and written to memory."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: float) -> Cost:
        """That of `count` launches."""
        return Cost(count * self.flops, count * self.bytes)


@dataclass(frozen=True)
class Floor:
    """Seconds that products and memory take, each alone."""

    products: float
    memory: float

    @property
    def seconds(self) -> float:
        """The floor: the longer one."""
        return max(self.products, self.memory)

    @property
    def bound(self) -> str:
        """What limits."""
        return "products" if self.products >= self.memory else "memory"


def floor(cost: Cost, rates: Rates, dtype: str) -> Floor:
    """Raises ConfigError for a dtype without a rate."""
    if dtype not in rates.tflops:
        raise ConfigError(
            f"there is no rate of {dtype} products ({rates.source}); there are: {', '.join(rates.tflops)}"
        )
    return Floor(cost.flops / (1e12 * rates.tflops[dtype]), cost.bytes / (1e9 * rates.gbps))


def linear_cost(product: Product, read: float, written: float | None = None) -> Cost:
    """One expert's product.

    read: bytes of a number of the rows and of the weights; written: of the result (default: the same). Float8 rows are
    written in two forms where both have readers. A residual has the 2 bytes of bf16 beside float8.
    """
    result = product.rows * product.out
    residual = result * max(read, 2.0) if product.residual else 0.0
    moved = read * (product.rows + product.out) * product.width
    moved += result * (read if written is None else written) + residual
    return Cost(product.flops, product.times * moved)


def linear_backward_costs(product: Product, read: float, gelu: bool = False) -> tuple[Cost, Cost]:
    """The gradients of one expert's product: of its rows, then of its weights.

    read: bytes of a number of the rows, of the weights and of both gradients. gelu: both launches read the
    pre-activation beside the gradient of the result.
    """
    rows, weights = product.rows * product.width, product.out * product.width
    result = product.rows * product.out * (2 if gelu else 1)
    moved = read * product.times * (result + weights + rows)
    return Cost(product.flops, moved), Cost(product.flops, moved)


def attention_cost(scores: float, rows: int, width: int, dtype: str) -> Cost:
    """Attention of `rows` rows with `width` columns in all heads together, of whose pairs a mask lets `scores` through."""
    return Cost(4.0 * scores * width, BYTES[dtype] * 4 * rows * width)


def attention_backward_cost(scores: float, rows: int, width: int, dtype: str) -> Cost:
    """Its gradients: five products (scores again, and one each for the probabilities, queries, keys and values).

    Read: queries, keys, values, the result and its gradient; written: three gradients.
    """
    return Cost(10.0 * scores * width, BYTES[dtype] * 8 * rows * width)


def cross_entropy_cost(rows: int, width: int, classes: int, dtype: str) -> Cost:
    """The losses of `rows` rows over `classes` classes whose logits stay on the chip."""
    return Cost(2.0 * rows * width * classes, BYTES[dtype] * (rows + classes) * width)


def cross_entropy_backward_cost(rows: int, width: int, classes: int, dtype: str) -> Cost:
    """Its gradients: three products, as the logits are made again; gradients of rows and weights are written."""
    return Cost(6.0 * rows * width * classes, BYTES[dtype] * 2 * (rows + classes) * width)


def patch_embedding_cost(config: BEiT3Config, images: int, dtype: str) -> Cost:
    """The patches of `images` images as rows: pixels, weights and positions are read."""
    patches = config.num_vision_tokens - 1
    pixels = config.in_chans * config.patch_size**2
    cost = linear_cost(Product(images * patches, pixels, config.embed_dim), BYTES[dtype])
    return cost + Cost(0, BYTES[dtype] * patches * config.embed_dim)


def launches(work: Work, dtype: str, products: str | None = None) -> list[Cost]:
    """The costs of a workload's launches: the products of all experts with the same sizes are one, and so is attention.

    products: what both factors of products with weights are rounded to, where that is not ``dtype``.
    """
    read, written = BYTES[products or dtype], BYTES[dtype]
    groups: dict[tuple[int, int, int, bool], Cost] = {}
    for product in work.products:
        key = (product.width, product.out, product.times, product.residual)
        groups[key] = groups.get(key, Cost(0, 0)) + linear_cost(product, read, written)
    attention = Cost(work.attention + work.scores_again, BYTES[dtype] * work.attention_values)
    return [*groups.values(), *([attention] if attention.flops else [])]


def workload_floor(work: Work, rates: Rates, dtype: str, products: str | None = None) -> float:
    """Seconds that the launches of a workload take at least, one after the other; ``products``: as in ``launches``."""
    weights, attention = split(work)
    costs = launches(weights, dtype, products)
    return sum(floor(cost, rates, products or dtype).seconds for cost in costs) + sum(
        floor(cost, rates, dtype).seconds for cost in launches(attention, dtype)
    )


def split(work: Work) -> tuple[Work, Work]:
    """The products with weights, and the rest, which is attention."""
    return Work(products=work.products), replace(work, products=())


def tile_share(tokens: int, tiles: str, head_width: int = 64, backward: bool = False) -> float:
    """Which part of the scores that a launch of the Triton attention kernel multiplies is asked for, in 16 bits.

    tiles: a file of kernels/tiles/. Queries fill whole tiles, keys whole steps or, in the form that holds whole rows
    of scores, 32 columns. In each of the two launches of ``backward`` one of them fills tiles and the other one steps.
    """
    longest = None if backward else tokens
    kernels = import_module("beit3_fast.kernels.shared_attention")
    own_class = kernels.shape_class(torch.bfloat16, head_width, longest)
    tile = _tiles.read(tiles)["shared_attention"][own_class]
    step = 32 if longest is not None and tokens <= tile.get("whole", 0) else tile["block_k"]
    queries = tile["block_q"] * math.ceil(tokens / tile["block_q"])
    return tokens**2 / (queries * step * math.ceil(tokens / step))
