"""Decoding token by token with torchscale's cache: a dictionary per layer with prev_key and prev_value.

Rows of vision and text stay where they are in [B, n, C]; expert_linear finds them by index. Keys and values of
earlier tokens have the shape [B, H, T, D]. Where pairs have experts of their own, an entry named ``pair`` says
that the cache holds an image, so that later words go to those experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.errors import ShapeError
from beit3_fast.layout import TokenLayout
from beit3_fast.model.encoder import feed_forward, layer_norm
from beit3_fast.model.experts import norm_of, route
from beit3_fast.ops import expert_linear


def encode_incremental(
    encoder: Any,
    x: Tensor,
    num_vision: int,
    blocked: Tensor | None,
    state: dict[int, dict[str, Tensor]] | list[dict[str, Tensor]],
    impl: str = "auto",
    hidden_states: list[Tensor] | None = None,
) -> Tensor:
    """Run new tokens x [B, n, C], the first ``num_vision`` of them vision, against the cache in ``state``.

    ``blocked`` [n, T] (nonzero: blocked) covers the cached and the new keys. ``state[layer]`` is extended by
    the new keys and values. Returns [B, n, C]. Padding is not masked here, as in torchscale. Raises ShapeError
    when the mask or a cache does not fit.
    """
    layers = len(encoder.layers)
    if isinstance(state, dict):
        caches = [state.setdefault(index, {}) for index in range(layers)]
    elif isinstance(state, list) and len(state) == layers:
        caches = state
    else:
        length = f" of {len(state)}" if isinstance(state, list) else ""
        raise ShapeError(
            f"incremental_state must be a dictionary, or a list of {layers} dictionaries, one a layer; "
            f"got {type(state).__name__}{length}"
        )
    batch, tokens, width = x.shape
    layout = TokenLayout.from_lengths([num_vision] * batch, [tokens - num_vision] * batch, x.device)
    if any("C" in layer.ffn._modules for layer in encoder.layers):
        if num_vision:
            for cache in caches:
                cache["pair"] = x.new_ones(batch, 1, 1, 1)
        elif "pair" in caches[0]:
            layout = replace(layout, text_only=0)
    places = torch.arange(batch * tokens, device=x.device).view(batch, tokens)
    order = torch.cat([places[:, :num_vision].flatten(), places[:, num_vision:].flatten()])
    rows = None if num_vision in (0, tokens) else order
    flat = x.reshape(batch * tokens, width)
    if hidden_states is not None:
        hidden_states.append(x)
    for layer, cache in zip(encoder.layers, caches, strict=True):
        flat = _layer(layer, flat, layout, rows, batch, blocked, cache, impl)
        if hidden_states is not None:
            hidden_states.append(flat.view(batch, tokens, width))
    if encoder.layer_norm is not None:
        packed = flat if rows is None else flat[rows]
        packed = layer_norm(encoder.layer_norm, packed, layout, impl)
        flat = packed if rows is None else torch.empty_like(packed).index_copy(0, rows, packed)
    return flat.view(batch, tokens, width)


def _layer(
    layer: Any,
    x: Tensor,
    layout: TokenLayout,
    rows: Tensor | None,
    batch: int,
    blocked: Tensor | None,
    cache: dict[str, Tensor],
    impl: str,
) -> Tensor:
    attention = layer.self_attn

    def linear(x: Tensor, modules: list[Any], norm: Any, residual: Tensor | None = None) -> Tensor:
        experts = [route(module, layout) for module in modules]
        inner = None
        if norm is not None:
            inner = norm_of(route(norm, layout).modules)
        per_expert = list(zip(*(e.modules for e in experts), strict=True))
        return expert_linear(
            x,
            [tuple(m.weight for m in parts) for parts in per_expert],
            [tuple(m.bias for m in parts) for parts in per_expert],
            bounds=experts[0].bounds,
            norm=inner,
            residual=residual,
            rows=rows,
            impl=impl,
        )

    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    qkv = linear(x, projections, layer.self_attn_layer_norm)
    heads = attention.num_heads
    q, k, v = qkv.view(batch, -1, 3, heads, x.shape[1] // heads).permute(2, 0, 3, 1, 4)
    if "prev_key" in cache:
        past = cache["prev_key"].shape
        if past[:2] != k.shape[:2] or past[3] != k.shape[3]:
            raise ShapeError(
                f"prev_key must be [B, H, T, D] = [{batch}, {heads}, T, {k.shape[3]}], got {list(past)}"
            )
        k = torch.cat([cache["prev_key"], k], dim=2)
        v = torch.cat([cache["prev_value"], v], dim=2)
    if blocked is not None and tuple(blocked.shape) != (q.shape[2], k.shape[2]):
        raise ShapeError(
            f"attn_mask must be [new tokens, all tokens] = {[q.shape[2], k.shape[2]]}, "
            f"got {list(blocked.shape)}"
        )
    # Contiguous, because torchscale and its decoders take views of the cache that join B and H.
    k, v = k.contiguous(), v.contiguous()
    cache["prev_key"], cache["prev_value"] = k, v
    visible = None if blocked is None else blocked == 0
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)  # [B, H, n, D]
    o = o.transpose(1, 2).reshape(x.shape[0], -1)
    x = linear(o, [attention.out_proj], attention.inner_attn_ln, residual=x)
    if rows is None:
        return feed_forward(layer, x, layout, impl).rows
    packed = feed_forward(layer, x[rows], layout, impl).rows
    return torch.empty_like(packed).index_copy(0, rows, packed)
