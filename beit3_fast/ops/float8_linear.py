"""expert_linear where the weights are rounded to float8: the rows are rounded as well, and every implementation says how.

The rows are rounded as ``beit3_fast.reference.float8_linear`` says, which is what the kernels do; sums, LayerNorm's
mean and deviation, bias, GELU and residual stay in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from beit3_fast.composite.float8_linear import float8_linear as composite_impl
from beit3_fast.derived import derived
from beit3_fast.errors import KernelUnavailable
from beit3_fast.float8 import BLOCK, E4M3, Quantized
from beit3_fast.ops import cuda_float8
from beit3_fast.ops.dispatch import Situation, rows_in_memory
from beit3_fast.ops.operands import Leaves, Measured, Weight, flat
from beit3_fast.ops.packed_weight import PackedWeight
from beit3_fast.reference.float8_linear import float8_linear as reference_impl


def float8_linear(
    impl: str,
    at: Situation,
    x: Measured,
    weights: Sequence[Weight],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    tail: tuple[Any, ...],
    leaves: Leaves,
    stores: bool,
) -> Measured:
    """Operands as ``measured_expert_linear`` has them after its checks; ``tail``: residual, rows, bounds, eps, activation."""
    rows = x.rows
    if at.autocast and rows.dtype != at.dtype and x.stored:
        x = Measured(rows.to(at.dtype))
    rounded = [_stacked(weight) for weight in weights]
    vectors = (list(biases), list(norm_weights), list(norm_biases))
    with torch.autocast(at.device, enabled=False):
        if impl == "cuda":
            return _on_cuda(x, rounded, *vectors, tail, leaves, stores)
        if not x.stored:
            raise KernelUnavailable(
                f"x is in memory in 8 bits alone, which impl='cuda' reads; got impl={impl!r}"
            )
        run = reference_impl if impl == "reference" else composite_impl
        return Measured(run(x.rows, rounded, *vectors, *tail))


def _stacked(weight: Weight) -> Quantized:
    own = [cast(PackedWeight, part) for part in flat([weight])]
    if len(own) == 1:
        return Quantized(*own[0].float8())
    return derived("float8, stacked", [part.packed for part in own], lambda: _joined(own))


def _joined(parts: Sequence[PackedWeight]) -> Quantized:
    numbers, scales = zip(*(part.float8() for part in parts), strict=True)
    return Quantized(
        torch.cat([n.view(torch.uint8) for n in numbers]).view(E4M3), torch.cat(scales)
    )


def _on_cuda(
    x: Measured,
    weights: Sequence[Quantized],
    biases: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    tail: tuple[Any, ...],
    leaves: Leaves,
    stores: bool,
) -> Measured:
    residual, rows, bounds, eps, activation = tail
    given = x.rounded if rows is None else None
    numbers, scales = given or (None, None)
    if rows is not None:
        leaves = "nothing"
    stores = stores or leaves != "all"
    y, parts, *left = cuda_float8.expert_linear(
        rows_in_memory(x.rows) if x.stored else x.rows[:0],
        numbers,
        scales,
        x.parts if given is not None else None,
        x.width,
        [own.numbers for own in weights],
        [own.scales for own in weights],
        biases,
        norm_weights,
        norm_biases,
        None if residual is None else rows_in_memory(residual),
        rows,
        list(bounds),
        eps,
        activation,
        leaves,
        stores,
    )
    if not stores:
        return Measured.in_8_bits(y, parts, BLOCK, Quantized(*left))
    if leaves == "all":
        return Measured(y, parts, BLOCK, Quantized(*left))
    return Measured(y, scales=left[1]) if leaves == "scales" else Measured(y)
