"""A layer in one call of the compiled library, where the CPU kernels compute all of it.

The same kernels as the five calls of its ops, so the same numbers bit for bit. With few rows (one sentence, one step of
decoding) a call from Python costs as much as what it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_fast.layout import Selection, TokenLayout
from beit3_fast.ops import dispatch, library
from beit3_fast.ops.cached_attention import PackedKeys
from beit3_fast.ops.expert_linear import packed_form
from beit3_fast.ops.operands import rounding
from beit3_fast.ops.packed_weight import PANEL, PackedWeight


class LayerOperands(NamedTuple):
    """The parameters of a layer by product (queries, keys and values; their projection; the two of the feed-forward network),
    in each by expert, and the rows of the experts.

    ``weights`` and ``biases`` hold query, key and value of an expert one after the other; ``eps`` one number a product.
    ``bounds``: of the attention's experts among all rows; ``own_bounds`` and ``ffn_bounds``: among the rows that are asked for.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]
    eps: list[float]
    bounds: tuple[int, ...]
    own_bounds: tuple[int, ...]
    ffn_bounds: tuple[int, ...]
    num_heads: int

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters."""
        return [*self.weights, *self.biases, *self.norm_weights, *self.norm_biases]


def encoder_layer(
    x: Tensor,
    operands: LayerOperands,
    layout: TokenLayout,
    *,
    mask: str = "bidirectional",
    read: Selection | None = None,
    impl: str = "auto",
) -> Tensor | None:
    """A layer of the encoder on rows x [R, C]: [R, C], or [Rq, C] for the rows that ``read`` names.

    None where the ops of the layer are to be called one by one: the CPU kernels are not those that ``impl`` takes, or some
    operand is none that they read as it is. Those calls say what is wrong with it.
    """
    if not _taken(x, operands, "shared_attention", impl):
        return None
    asked: tuple[Tensor | None, ...] = ()
    if read is not None:
        asked = (read.rows, read.layout.cu_vision, read.layout.cu_text, read.layout.positions)
    bounds = (operands.bounds, operands.own_bounds, operands.ffn_bounds)
    try:
        y: Tensor = _ops().encoder_layer.default(
            dispatch.rows_in_memory(x),
            *_parameters(operands),
            *bounds,
            operands.num_heads,
            mask,
            layout.cu_vision,
            layout.cu_text,
            *asked,
        )
    except RuntimeError as error:
        if not _refused("encoder_layer", error):
            raise
        return None
    return y


def decoder_layer(
    x: Tensor,
    operands: LayerOperands,
    k: Tensor,
    v: Tensor,
    *,
    place: int,
    seen: Tensor,
    samples: Sequence[int],
    prefix: PackedKeys | None = None,
    impl: str = "auto",
) -> Tensor | None:
    """A layer on the new rows x [S * m, C] of S sequences, as ``cached_attention`` attends: [S * n, C], their last n rows each.

    k and v [B, N, C]: the cache, in which sample ``samples[s]`` takes the keys and values of sequence s from ``place`` on;
    ``seen`` bool [S, n, N]. None as in ``encoder_layer``; the cache may have been written then.
    """
    if not _taken(x, operands, "cached_attention", impl):
        return None
    packed = (None, 0) if prefix is None else prefix
    try:
        y: Tensor = _ops().decoder_layer.default(
            dispatch.rows_in_memory(x),
            *_parameters(operands),
            operands.num_heads,
            k,
            v,
            place,
            seen.contiguous(),
            torch.tensor(samples, dtype=torch.int64),
            *packed,
        )
    except RuntimeError as error:
        if not _refused("decoder_layer", error):
            raise
        return None
    return y


def _refused(op: str, error: RuntimeError) -> bool:
    """Whether the op refused an operand, which it says in its own name: any other error is a failure."""
    return str(error).startswith(f"{op}: ")


def _parameters(operands: LayerOperands) -> tuple[Any, ...]:
    packed = [packed_form(weight) for weight in operands.weights]
    vectors = (operands.biases, operands.norm_weights, operands.norm_biases)
    return packed, *vectors, operands.eps


def _taken(x: Tensor, operands: LayerOperands, attention: str, impl: str) -> bool:
    """Whether products and this attention take the CPU kernels, with weights that these read part by part."""
    weights = operands.weights
    if torch.compiler.is_compiling() or x.dim() != 2 or not len(x):
        return False
    if x.shape[1] % PANEL or any(weight.dtype is not x.dtype for weight in weights):
        return False
    rounded = rounding(weights[0])
    at = dispatch.situation(
        "expert_linear",
        [x, *operands.tensors],
        int8=rounded == "int8",
        float8=rounded == "float8",
        packed=any(isinstance(weight, PackedWeight) for weight in weights),
    )
    if at.needs_grad or at.autocast:
        return False
    if dispatch.choose(at, impl).impl != "cpu":
        return False
    at = at._replace(op=attention, int8=False, packed=False)
    return dispatch.choose(at, impl).impl == "cpu"


def _ops() -> Any:
    """The compiled ops, with their shape functions registered."""
    _register()
    return torch.ops.beit3_fast


@library.once
def _register() -> None:
    library.load()

    @torch.library.register_fake("beit3_fast::encoder_layer")
    def _(x: Tensor, *operands: Any) -> Tensor:
        rows = operands[12] if len(operands) > 12 else None
        return x.new_empty(x.shape[0] if rows is None else rows.shape[0], x.shape[1])

    @torch.library.register_fake("beit3_fast::decoder_layer")
    def _(x: Tensor, *operands: Any) -> Tensor:
        seen = operands[9]
        return x.new_empty(seen.shape[0] * seen.shape[1], x.shape[1])
