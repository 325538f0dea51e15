"""The Multiway Transformer on packed rows: every layer is five calls of two ops, or all layers are one (``one_call``).

Rows go from op to op with the statistics that the op left which wrote them (``Measured``): the LayerNorm in front of
the next product need not read them. ``encoder_layer`` and ``encode_rows`` read parameters by their official names only, so they run the modules
of model/parameters.py and torchscale's own modules alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.derived import needs_grad
from beit3_fast.float8 import BLOCK
from beit3_fast.layout import Part, Selection, TokenLayout
from beit3_fast.model.drop_path import Draws, Kept, draw, touch
from beit3_fast.model.experts import expert_norm, norm_of, route
from beit3_fast.model.one_call import is_watched, layers_in_one_call
from beit3_fast.model.stack import computed
from beit3_fast.ops import (
    Measured,
    Norm,
    expert_layer_norm,
    measured,
    measured_expert_linear,
    measured_shared_attention,
    rounding,
)
from beit3_fast.padded_layout import PaddedLayout

# Of base width: 9 MB of queries, keys and values and 13 MB of hidden activations in bf16.
_ROWS_AT_ONCE = 2048


class Layer(nn.Module):
    """A layer that ``encode_rows`` calls as a module, so that FSDP2, which hooks into such calls, can shard it."""

    def forward(self, x: Measured, layout: TokenLayout, **options: Any) -> Measured:
        """``run_layer`` of this layer."""
        return run_layer(self, x, layout, **options)


def run_layer(
    layer: Any, x: Measured, layout: TokenLayout, recompute: str = "none", **options: Any
) -> Measured:
    """``encoder_layer``, the backward pass of which computes the "layer" or its "ffn" again instead of keeping it."""
    options["recompute_ffn"] = recompute == "ffn"
    return computed(encoder_layer, layer, x, layout, again=recompute == "layer", **options)


def encoder_layer(
    layer: Any,
    x: Measured,
    layout: TokenLayout,
    *,
    mask: str | Tensor = "bidirectional",
    read: Selection | None = None,
    kept: Draws = (None, None),
    recompute_ffn: bool = False,
    impl: str = "auto",
) -> Measured:
    """x [R, C] -> [R, C], or [Rq, C] for the rows that ``read`` names.

    ``kept``: what drop path leaves of the attention and of the feed-forward branch.
    """
    own = layout if read is None else read.layout
    first, second = kept
    if first is None and second is None and x.parts is None:
        whole = layers_in_one_call([layer], x.rows, layout, mask, read, impl)
        if whole is not None:
            return Measured(whole)
    queries = x if read is None else x.select(read.rows)
    residual = queries.rows
    if first is None:
        x = _attention(layer, x, layout, queries, own, mask, residual, impl)
    elif first.samples is None:
        y = _attention(layer, x, layout, queries, own, mask, None, impl)
        x = Measured(residual + y.rows * first.of_rows(own))
    else:
        x = Measured(_attention_of_some(layer, x.rows, layout, residual, own, mask, first, impl))
    return computed(feed_forward, layer, x, own, impl, second, again=recompute_ffn)


def _attention(
    layer: Any,
    x: Measured,
    layout: TokenLayout,
    queries: Measured,
    own: TokenLayout,
    mask: str | Tensor,
    residual: Tensor | None,
    impl: str,
) -> Measured:
    """The first half of a layer for the rows ``queries`` [Rq, C] of x [R, C]; the residual is added where given."""
    attention = layer.self_attn
    names = "qkv" if own is layout else "kv"
    projected = _projected(layer, x, layout, names, impl)
    *first, k, v = projected.rows.chunk(len(names), dim=1)
    if first:
        q = first[0]
    else:
        q = _linear(queries, attention.q_proj, own, layer.self_attn_layer_norm, None, impl).rows
    o = measured_shared_attention(
        q,
        k,
        v,
        layout,
        num_heads=attention.num_heads,
        mask=mask,
        queries=None if own is layout else own,
        impl=impl,
        v_scales=_scales_of_values(projected, v),
    )
    return _linear(o, attention.out_proj, own, attention.inner_attn_ln, residual, impl)


def _attention_of_some(
    layer: Any,
    x: Tensor,
    layout: TokenLayout,
    queries: Tensor,
    own: TokenLayout,
    mask: str | Tensor,
    kept: Kept,
    impl: str,
) -> Tensor:
    """``_attention`` without the samples that drop path drops, added to ``queries``."""
    assert kept.samples is not None
    if all(kept.samples):
        every = _attention(layer, Measured(x), layout, Measured(queries), own, mask, None, impl)
        return kept.add(queries, every.rows, None)
    inside = layout.keep(kept.samples)
    inside_own = inside if own is layout else own.keep(kept.samples)
    y = queries
    if any(kept.samples):
        some = Measured(x.index_select(0, inside.rows))
        asking = some
        if own is not layout:
            asking = Measured(queries.index_select(0, inside_own.rows))
        rest = (asking, inside_own.layout, mask, None, impl)
        branch = _attention(layer, some, inside.layout, *rest).rows
        y = kept.add(queries, branch, inside_own.rows)
    attention = layer.self_attn
    keys = (layer.self_attn_layer_norm, attention.k_proj, attention.v_proj)
    rows = (attention.q_proj, attention.inner_attn_ln, attention.out_proj)
    uses = [(module, layout, inside.layout) for module in keys]
    uses += [(module, own, inside_own.layout) for module in rows]
    return touch(y, uses, route)


def project(
    layer: Any, x: Tensor | Measured, layout: TokenLayout, names: str, impl: str
) -> tuple[Tensor, ...]:
    """LayerNorm and the projections that ``names`` spells ("qkv" or "kv"), in one product: [R, C] each."""
    return _projected(layer, x, layout, names, impl).rows.chunk(len(names), dim=1)


def _projected(
    layer: Any, x: Tensor | Measured, layout: TokenLayout, names: str, impl: str
) -> Measured:
    attention = layer.self_attn
    routes = [route(getattr(attention, f"{name}_proj"), layout) for name in names]
    experts = list(zip(*(own.modules for own in routes), strict=True))
    return measured_expert_linear(
        x,
        [tuple(linear.weight for linear in own) for own in experts],
        [tuple(linear.bias for linear in own) for own in experts],
        bounds=routes[0].bounds,
        norm=_norm(layer.self_attn_layer_norm, layout),
        impl=impl,
        leaves="scales",
    )


def _scales_of_values(projected: Measured, v: Tensor) -> Tensor | None:
    """Those of the last columns of the product, where a block of columns begins with theirs."""
    if projected.scales is None or v.shape[1] % BLOCK:
        return None
    return projected.scales[:, -(v.shape[1] // BLOCK) :]


def attend(
    layer: Any, o: Tensor | Measured, residual: Tensor, layout: TokenLayout, impl: str
) -> Measured:
    """The rest of a layer after its attention o [R, C], without drop path."""
    attention = layer.self_attn
    x = _linear(o, attention.out_proj, layout, attention.inner_attn_ln, residual, impl)
    return feed_forward(layer, x, layout, impl)


def feed_forward(
    layer: Any, x: Tensor | Measured, layout: TokenLayout, impl: str, kept: Kept | None = None
) -> Measured:
    """The second half of a layer: x + fc2(LN(gelu(fc1(LN(x))))), x [R, C]."""
    x = measured(x)
    if kept is None:
        return _feed_forward(layer, x, layout, x.rows, impl)
    if kept.samples is None:
        branch = _feed_forward(layer, x, layout, None, impl).rows
        return Measured(x.rows + branch * kept.of_rows(layout))
    if all(kept.samples):
        branch = _feed_forward(layer, x, layout, None, impl).rows
        return Measured(kept.add(x.rows, branch, None))
    inside = layout.keep(kept.samples)
    y = x.rows
    if any(kept.samples):
        some = Measured(x.rows.index_select(0, inside.rows))
        branch = _feed_forward(layer, some, inside.layout, None, impl).rows
        y = kept.add(x.rows, branch, inside.rows)
    uses = [(module, layout, inside.layout) for module in (layer.final_layer_norm, layer.ffn)]
    return Measured(touch(y, uses, route))


def _feed_forward(
    layer: Any, x: Measured, layout: TokenLayout, residual: Tensor | None, impl: str
) -> Measured:
    experts = route(layer.ffn, layout)
    norm = _norm(layer.final_layer_norm, layout)
    linears = [e.fc2 for e in experts.modules]
    stores = rounding(linears[0].weight) != "float8"
    h = _experts_linear(
        x, [e.fc1 for e in experts.modules], experts.bounds, norm, "gelu", None, impl, stores
    )
    norms = [e.ffn_layernorm for e in experts.modules]
    inner = None if norms[0] is None else norm_of(norms)
    return _experts_linear(h, linears, experts.bounds, inner, None, residual, impl)


def _linear(
    x: Tensor | Measured,
    linear: nn.Module,
    layout: TokenLayout,
    norm: nn.Module | None,
    residual: Tensor | None,
    impl: str,
) -> Measured:
    experts = route(linear, layout)
    inner = None if norm is None else _norm(norm, layout)
    return _experts_linear(x, experts.modules, experts.bounds, inner, None, residual, impl)


def _experts_linear(
    x: Tensor | Measured,
    linears: list[Any],
    bounds: tuple[int, ...],
    norm: Norm | None,
    activation: str | None,
    residual: Tensor | None,
    impl: str,
    stores: bool = True,
) -> Measured:
    return measured_expert_linear(
        x,
        [linear.weight for linear in linears],
        [linear.bias for linear in linears],
        bounds=bounds,
        norm=norm,
        activation=activation,
        residual=residual,
        impl=impl,
        stores=stores,
    )


def _norm(norm: nn.Module, layout: TokenLayout) -> Norm:
    return norm_of(route(norm, layout).modules)


def layer_norm(norm: nn.Module, x: Tensor, layout: TokenLayout, impl: str) -> Tensor:
    """LayerNorm of every row by its own expert, [R, C] -> [R, C]."""
    return expert_layer_norm(x, expert_norm(norm, layout), impl=impl)


def encode_rows(
    encoder: Any,
    x: Tensor,
    layout: TokenLayout,
    *,
    mask: str | Tensor = "bidirectional",
    read: Selection | None = None,
    drop_path_rates: Sequence[float] = (),
    hidden_states: list[Tensor] | None = None,
    recompute: Sequence[str] = (),
    impl: str = "auto",
) -> Tensor:
    """All layers and the output LayerNorm on packed rows x [R, C].

    With ``read`` only the rows that it names are computed in the last layer; the result is then [Rq, C].
    ``hidden_states`` collects x and every layer's output (all rows). ``drop_path_rates`` has one rate a layer;
    empty means none (evaluation). ``recompute`` says of each layer what ``run_layer`` computes again; empty means nothing.
    """
    in_parts = (
        hidden_states is None
        and not isinstance(layout, PaddedLayout)
        and layout.num_rows > _ROWS_AT_ONCE
        and layout.batch_size > 1
        and x.device.type == "cpu"
        and not needs_grad(x)
        and not drop_path_rates
    )
    layers = list(encoder.layers)
    last = len(layers) - 1
    rigid = isinstance(layout, PaddedLayout) or torch.compiler.is_compiling()
    skip = isinstance(mask, str) and not rigid
    kept = draw(drop_path_rates, x, layout, skip)
    if hidden_states is not None:
        hidden_states.append(x)
    state, begin = Measured(x), 0
    if hidden_states is None and not kept:
        together = layers if read is None else layers[:-1]
        if len(together) > 1 and not any(is_watched(layer, Layer) for layer in together):
            norm = encoder.layer_norm if read is None else None
            most = _ROWS_AT_ONCE if in_parts else None
            whole = layers_in_one_call(together, x, layout, mask, None, impl, norm, most)
            if whole is not None and read is None:
                return whole
            if whole is not None:
                state, begin = Measured(whole), len(together)
    if in_parts and begin == 0 and isinstance(mask, str):
        return _encode_in_parts(encoder, x, layout, mask, read, impl)
    for index, layer in enumerate(layers[begin:], begin):
        early = read if index == last and hidden_states is None else None
        options: dict[str, Any] = {
            "mask": mask,
            "read": early,
            "kept": kept[index] if kept else (None, None),
            "recompute": recompute[index] if recompute else "none",
            "impl": impl,
        }
        own_call = isinstance(layer, Layer)
        run = layer if own_call else partial(run_layer, layer)
        state = run(state, layout, **options)
        if hidden_states is not None:
            hidden_states.append(state.rows)
    x = state.rows
    if read is not None and x.shape[0] != read.layout.num_rows:
        x = x[read.rows]
    own = layout if read is None else read.layout
    return x if encoder.layer_norm is None else layer_norm(encoder.layer_norm, x, own, impl)


def _encode_in_parts(
    encoder: Any,
    x: Tensor,
    layout: TokenLayout,
    mask: str,
    read: Selection | None,
    impl: str,
) -> Tensor:
    """``encode_rows`` a few samples at a time: less memory, and a layer's activations stay in the cache."""
    vision_parts, text_parts = [], []
    start = 0
    for part in layout.split(_ROWS_AT_ONCE):
        own = None if read is None else _read_of(read, part, start)
        start += part.layout.batch_size
        rows = encode_rows(encoder, part.of(x), part.layout, mask=mask, read=own, impl=impl)
        split = (part.layout if own is None else own.layout).num_vision_rows
        vision_parts.append(rows[:split])
        text_parts.append(rows[split:])
    return torch.cat(vision_parts + text_parts)


def _read_of(read: Selection, part: Part, start: int) -> Selection:
    """The rows of a selection that lie in a part, counted from the part's first row."""
    own = read.layout.part(start, start + part.layout.batch_size)
    vision = read.rows[own.vision] - part.vision.start
    text = read.rows[own.text] - part.text.start + part.layout.num_vision_rows
    return Selection(torch.cat([vision, text]), own.layout)
