"""What happens to packed rows behind the layers: the last LayerNorm, and the way back to padded rows.

Memory is all that either costs, so the compiled kernels matter for where results lie: in memory that earlier results have left
(``csrc/cpu/huge_pages.h``), where PyTorch would ask the system for new pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_fast.composite._layer_norm import layer_norm
from beit3_fast.derived import needs_grad
from beit3_fast.ops import dispatch, library

_FLOATS = (torch.float32, torch.bfloat16)


class ExpertNorm(NamedTuple):
    """LayerNorms by expert: rows [bounds[e], bounds[e + 1]) are normalised by ``weights[e]`` and ``biases[e]`` [C]."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    eps: Sequence[float]
    bounds: Sequence[int]

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters; an expert may lack some."""
        return [own for own in (*self.weights, *self.biases) if own is not None]


def expert_layer_norm(x: Tensor, norm: ExpertNorm, *, impl: str = "auto") -> Tensor:
    """LayerNorm of every row of x [R, C] by its expert: [R, C] in x's dtype, or what autocast makes of it.

    Differentiable. ``impl`` as for ``expert_linear``, whose choice it follows.
    """
    at = dispatch.situation("expert_linear", [x, *norm.tensors])
    plain = not (at.needs_grad or at.autocast or at.compiling) and are_plain(norm)
    if at.device == "cpu" and plain and dispatch.choose(at, impl).impl == "cpu":
        y: Tensor = _ops().expert_layer_norm.default(dispatch.rows_in_memory(x), *norm)
        return y
    each = zip(norm.weights, norm.biases, norm.eps, pairwise(norm.bounds), strict=True)
    parts = [
        layer_norm(x[start:stop], weight, bias, eps)
        for weight, bias, eps, (start, stop) in each
        if stop > start
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else x


def are_plain(norm: ExpertNorm) -> bool:
    """Whether the CPU kernels read these parameters as they are."""
    vectors = norm.tensors
    if len(vectors) < len(norm.weights) + len(norm.biases):
        return False
    return all(vector.dtype in _FLOATS and vector.is_contiguous() for vector in vectors)


def unpack_rows(x: Tensor, places: Tensor, count: int) -> Tensor:
    """Rows [count, C], row ``places[r]`` of which is row r of x [R, C]; the others are zero. places: int64 [R], no two the same.

    Differentiable.
    """
    compiled = x.device.type == "cpu" and places.device.type == "cpu" and library.available()
    if compiled and not torch.compiler.is_compiling() and not needs_grad(x):
        rows = dispatch.rows_in_memory(x)
        y: Tensor = _ops().unpack_rows.default(rows, places.contiguous(), count)
        return y
    return x.new_zeros(count, x.shape[1]).index_copy(0, places, x)


@library.once
def _ops() -> Any:
    """The compiled ops, with their shape functions registered once."""
    library.load()

    @torch.library.register_fake("beit3_fast::expert_layer_norm")
    def _(x: Tensor, *_: Any) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("beit3_fast::unpack_rows")
    def _(x: Tensor, places: Tensor, count: int) -> Tensor:
        return x.new_empty(count, x.shape[1])

    return torch.ops.beit3_fast
