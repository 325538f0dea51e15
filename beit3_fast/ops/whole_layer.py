"""Layers in one call of the compiled library, where the CPU kernels compute all of them.

The same kernels as the five calls of a layer's ops, so the same numbers bit for bit. What runs between two layers finds
nothing in the caches: a call from Python, 0.1 ms by itself, took up to 1 ms there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_fast.derived import is_kept
from beit3_fast.layout import Selection, TokenLayout
from beit3_fast.ops import dispatch, library
from beit3_fast.ops.cached_attention import PackedKeys
from beit3_fast.ops.expert_linear import packed_form
from beit3_fast.ops.operands import rounding
from beit3_fast.ops.packed_weight import PANEL, PackedWeight
from beit3_fast.ops.rows import ExpertNorm, are_plain

_NO_NORM = ExpertNorm((), (), (), ())


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


def encoder_layers(
    x: Tensor,
    layers: Sequence[LayerOperands],
    layout: TokenLayout,
    *,
    mask: str = "bidirectional",
    read: Selection | None = None,
    last: ExpertNorm | None = None,
    most_rows: int | None = None,
    impl: str = "auto",
) -> Tensor | None:
    """Layers of the encoder, one after the other, on rows x [R, C], and what normalises the last one's: [R, C]. Only a single
    layer may compute the rows that ``read`` names: [Rq, C].

    None where the ops of the layers are to be called one by one: the CPU kernels are not those that ``impl`` takes, or some
    operand is none that they read as it is. Those calls say what is wrong with it. None as well for more than ``most_rows``
    rows, unless each thread takes its own samples through all layers: little between kernels grows with their number then.
    """
    behind = [] if last is None else last.tensors
    if not _taken(x, layers, "shared_attention", impl, behind):
        return None
    if len(layers) > 1 and not all(_stays_packed(w) for layer in layers for w in layer.weights):
        return None
    if last is not None and not are_plain(last):
        return None
    asked: tuple[Tensor | None, ...] = ()
    if read is not None:
        asked = (read.rows, read.layout.cu_vision, read.layout.cu_text, read.layout.positions)
    places = (mask, layout.cu_vision, layout.cu_text, *asked)
    y = dispatch.rows_in_memory(x)
    # One call for all layers whose experts have the same rows.
    groups = [(shape, list(own)) for shape, own in groupby(layers, _shape)]
    for index, (shape, own) in enumerate(groups, 1):
        norm = last if last is not None and index == len(groups) else _NO_NORM
        parameters = _parameters(own)
        try:
            y = _ops().encoder_layers.default(
                y, *parameters, *shape, *norm, *places, most_rows=most_rows
            )
        except RuntimeError as error:
            if not _refused("encoder_layers", error):
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
    ``seen`` bool [S, n, N]. None as in ``encoder_layers``.
    """
    if not _taken(x, [operands], "cached_attention", impl):
        return None
    packed = (None, 0) if prefix is None else prefix
    try:
        y: Tensor = _ops().decoder_layer.default(
            dispatch.rows_in_memory(x),
            *_parameters([operands]),
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


def _stays_packed(weight: Tensor) -> bool:
    """Whether the weight is not packed for a single call: so many at once would be a second model."""
    return isinstance(weight, PackedWeight) or is_kept(weight)


def _shape(layer: LayerOperands) -> tuple[Any, ...]:
    return layer.bounds, layer.own_bounds, layer.ffn_bounds, layer.num_heads


def _parameters(layers: Sequence[LayerOperands]) -> tuple[Any, ...]:
    """Those of all layers, one layer after the other."""
    packed = [packed_form(weight) for layer in layers for weight in layer.weights]
    biases = [bias for layer in layers for bias in layer.biases]
    norm_weights = [weight for layer in layers for weight in layer.norm_weights]
    norm_biases = [bias for layer in layers for bias in layer.norm_biases]
    return packed, biases, norm_weights, norm_biases, [eps for layer in layers for eps in layer.eps]


def _taken(
    x: Tensor,
    layers: Sequence[LayerOperands],
    attention: str,
    impl: str,
    others: Sequence[Tensor] = (),
) -> bool:
    """Whether products and this attention take the CPU kernels, with weights that these read part by part; ``others`` are
    further operands of the call.
    """
    if torch.compiler.is_compiling() or x.dim() != 2 or not len(x) or x.shape[1] % PANEL:
        return False
    weights = [weight for layer in layers for weight in layer.weights]
    if any(weight.dtype is not x.dtype for weight in weights):
        return False
    rounded = rounding(weights[0])
    at = dispatch.situation(
        "expert_linear",
        [x, *others, *(tensor for layer in layers for tensor in layer.tensors)],
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

    @torch.library.register_fake("beit3_fast::encoder_layers")
    def _(x: Tensor, *operands: Any) -> Tensor:
        rows = operands[16] if len(operands) > 16 else None
        return x.new_empty(x.shape[0] if rows is None else rows.shape[0], x.shape[1])

    @torch.library.register_fake("beit3_fast::decoder_layer")
    def _(x: Tensor, *operands: Any) -> Tensor:
        seen = operands[9]
        return x.new_empty(seen.shape[0] * seen.shape[1], x.shape[1])
