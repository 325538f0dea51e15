"""The CUDA kernels of products in float8 as ``float8_linear`` calls them: inference, rows and results in bf16."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_fast.composite.float8_linear import fold
from beit3_fast.derived import derived
from beit3_fast.errors import KernelUnavailable
from beit3_fast.float8 import BLOCK, E4M3, Quantized, dequantize, quantize
from beit3_fast.ops import cuda_kernels


class _Weights(NamedTuple):
    """Those of all experts."""

    numbers: Tensor  # e4m3 [E, N, K]
    scales: Tensor  # fp32 [E, N]
    sums: Tensor | None  # fp32 [E, N]; None: no LayerNorm
    biases: Tensor | None  # fp32 [E, N]


def folded(
    numbers: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
) -> _Weights:
    """What the kernels read of the weights of all experts, once for every state of their sources."""

    def make() -> _Weights:
        beside = []
        for e, own in enumerate(numbers):
            norm = (norm_weights[e], norm_biases[e]) if norm_weights else (None, None)
            plain = dequantize(Quantized(own, scales[e]), own.shape[1])
            beside.append(fold(plain, biases[e] if biases else None, *norm))
        stacked = torch.stack([own.view(torch.uint8) for own in numbers]).view(E4M3)
        # Either all experts have them or none has.
        sums = [own.sums for own in beside if own.sums is not None]
        constants = [own.constant for own in beside if own.constant is not None]
        return _Weights(
            stacked,
            torch.stack([own.flatten() for own in scales]),
            torch.stack(sums) if sums else None,
            torch.stack(constants) if constants else None,
        )

    sizes = (len(numbers), len(biases), len(norm_weights))
    sources = [*numbers, *scales, *biases, *norm_weights, *norm_biases]
    return derived(f"float8, folded {sizes}", sources, make)


def is_plain(norm_weights: list[Tensor]) -> bool:
    """Whether LayerNorm multiplies by 1: its weight has gone into the product's (``model.float8``)."""
    return not norm_weights or derived(
        "all ones", norm_weights, lambda: all(bool((own == 1).all()) for own in norm_weights)
    )


@torch.library.custom_op("beit3_fast::cuda_float8_linear", mutates_args=())
def expert_linear(
    x: Tensor,
    numbers: Tensor | None,
    scales: Tensor | None,
    parts: Tensor | None,
    part_width: int,
    weights: list[Tensor],
    weight_scales: list[Tensor],
    biases: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    residual: Tensor | None,
    rows: Tensor | None,
    bounds: list[int],
    eps: float,
    activation: str,
    leaves: str,
    stores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [M, N], and of what it ``leaves`` for the next op "all" (the row statistics of y in parts of 128 columns, y in 8
    bits and its scales), its "scales" or "nothing". ``numbers``, ``scales`` and ``parts``: the same of x, where the op
    before has left them; x need then have no rows. ``stores``: whether y itself is wanted; else it has no rows, and
    neither may ``rows`` be given. Raises KernelUnavailable where x without rows would have to be read."""
    given = folded(weights, weight_scales, biases, norm_weights, norm_biases)
    out = given.numbers.shape[1]
    count = x.shape[0] if numbers is None else numbers.shape[0]
    left = _left(x, count, out, leaves)
    y = x.new_empty(count if stores else 0, out)
    if rows is not None:
        y.zero_()
    if not bounds[-1]:
        return y, *left
    if rows is not None:
        x, residual = x[rows], None if residual is None else residual[rows]
    plain = is_plain(norm_weights)
    if len(x) < count and not plain:
        raise KernelUnavailable(
            "x is in memory in 8 bits alone, and LayerNorm's weight, which to_float8 moved into the product's, was changed "
            "since; round the model again"
        )
    if numbers is None or scales is None or not plain:
        numbers, scales, measured = _rounded(x, norm_weights, bounds)
        parts, part_width = measured, BLOCK
    elif norm_weights and parts is None:
        parts, part_width = _rounded(x, [], bounds)[2], BLOCK
    own_y = (y if stores else None) if rows is None else x.new_empty(x.shape[0], out)
    residual = None if residual is None else cuda_kernels.aligned(residual)
    wanted = [own if own.numel() else None for own in left]
    moments = parts if given.sums is not None else None
    for e, own in cuda_kernels.expert_groups(bounds):
        few = [None if t is None else t[e : e + len(own) - 1] for t in given]
        tail = (moments, part_width, eps, residual, own, activation == "gelu", own_y)
        cuda_kernels.launch("float8_linear", numbers, scales, *few, *tail, *wanted)
    if rows is not None and own_y is not None:
        y.index_copy_(0, rows, own_y)
    return y, *left


@expert_linear.register_fake
def _(
    x: Tensor, numbers: Any, scales: Any, parts: Any, width: int, weights: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = weights[0].shape[0]
    *_, leaves, stores = rest
    count = x.shape[0] if numbers is None else numbers.shape[0]
    return x.new_empty(count if stores else 0, out), *_left(x, count, out, leaves)


def _left(x: Tensor, count: int, out: int, leaves: str) -> tuple[Tensor, Tensor, Tensor]:
    tiles, every = -(-out // BLOCK), leaves == "all"
    parts = x.new_empty(count if every else 0, tiles, 2, dtype=torch.float32)
    numbers = x.new_empty(count if every else 0, out, dtype=E4M3)
    scales = x.new_empty(0 if leaves == "nothing" else count, tiles, dtype=torch.float32)
    return parts, numbers, scales


def _rounded(
    x: Tensor, norm_weights: list[Tensor], bounds: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """x in 8 bits, its scales, and its row statistics in parts of 128 columns."""
    parts, numbers, scales = _left(x, x.shape[0], x.shape[1], "all")
    cuda_kernels.launch("quantize_rows", cuda_kernels.aligned(x), numbers, scales, parts)
    if is_plain(norm_weights):
        return numbers, scales, parts
    scaled = x.float()
    for e, own in enumerate(norm_weights):
        scaled[bounds[e] : bounds[e + 1]] *= own.float()
    return *quantize(scaled), parts
