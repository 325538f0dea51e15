"""The Multiway Transformer on packed rows: every layer is five calls of two ops.

``encoder_layer`` and ``encode_rows`` read parameters by their official names only, so they run the modules
below and torchscale's own modules alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_fast.composite._layer_norm import layer_norm as _norm_rows
from beit3_fast.config import BEiT3Config
from beit3_fast.derived import needs_grad
from beit3_fast.errors import ShapeError
from beit3_fast.layout import Part, Selection, TokenLayout
from beit3_fast.ops import Norm, expert_linear, shared_attention

# Of base width: 9 MB of queries, keys and values and 13 MB of hidden activations in bf16.
_ROWS_AT_ONCE = 2048

EXPERT_OF = {"vision": "A", "text": "B"}


class Multiway(nn.Module):
    """One module per expert, named A (vision), B (text) and, for pairs, C; a holder of parameters."""

    def __init__(self, **experts: nn.Module) -> None:
        super().__init__()
        for name, module in experts.items():
            self.add_module(name, module)


def multiway(names: Sequence[str], make: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """A Multiway of ``make(*args, **kwargs)`` modules, or one bare module where names is empty."""
    if not names:
        return make(*args, **kwargs)
    return Multiway(**{name: make(*args, **kwargs) for name in names})


class Attention(nn.Module):
    """Parameters of joint attention: four projections and the sub-LayerNorm in front of the last."""

    def __init__(self, config: BEiT3Config, names: Sequence[str]) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.k_proj = multiway(names, nn.Linear, width, width)
        self.v_proj = multiway(names, nn.Linear, width, width)
        self.q_proj = multiway(names, nn.Linear, width, width)
        self.out_proj = multiway(names, nn.Linear, width, width)
        self.inner_attn_ln = multiway(names, nn.LayerNorm, width, config.layer_norm_eps)


class FeedForward(nn.Module):
    """Parameters of one feed-forward expert."""

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.embed_dim)
        self.ffn_layernorm = nn.LayerNorm(config.ffn_dim, config.layer_norm_eps)


class EncoderLayer(nn.Module):
    """Parameters of one layer; ``encoder_layer`` computes it."""

    def __init__(self, config: BEiT3Config, depth: int) -> None:
        super().__init__()
        own = [EXPERT_OF[modality] for modality in config.modalities]
        attention = own if config.attention == "decoupled" else []
        fused = len(own) == 2 and depth >= config.num_layers - config.vl_expert_layers
        experts = [*own, "C"] if fused else own
        width, eps = config.embed_dim, config.layer_norm_eps
        self.self_attn = Attention(config, attention)
        self.self_attn_layer_norm = multiway(attention, nn.LayerNorm, width, eps)
        self.ffn = multiway(experts, FeedForward, config)
        self.final_layer_norm = multiway(experts, nn.LayerNorm, width, eps)


class Encoder(nn.Module):
    """Parameters of the encoder: position tables, layers, output LayerNorm."""

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        own = [EXPERT_OF[modality] for modality in config.modalities]
        tables = {
            "A": config.num_vision_tokens + 2,
            "B": config.max_text_positions,
        }
        self.embed_positions = Multiway(
            **{name: nn.Embedding(tables[name], config.embed_dim) for name in own}
        )
        self.layers = nn.ModuleList(
            [EncoderLayer(config, depth) for depth in range(config.num_layers)]
        )
        self.layer_norm = (
            multiway(own, nn.LayerNorm, config.embed_dim, config.layer_norm_eps)
            if config.normalize_output
            else None
        )
        self.checkpoint_activations = config.checkpoint_activations
        steps = max(config.num_layers - 1, 1)
        self.drop_path_rates = tuple(
            config.drop_path_rate * depth / steps for depth in range(config.num_layers)
        )


class Route(NamedTuple):
    """The experts of a module in row order, and the row ranges that they own."""

    modules: list[Any]
    bounds: tuple[int, ...]


def route(module: nn.Module, layout: TokenLayout) -> Route:
    """Send the rows of a layout to the experts of a Multiway, or all to a bare module."""
    children = module._modules
    if "C" in children:
        return Route([children[name] for name in "ACB"], layout.expert_bounds("ACB"))
    if "A" in children and "B" in children:
        return Route([children["A"], children["B"]], layout.expert_bounds("AB"))
    if "A" not in children and "B" not in children:
        return Route([module], layout.expert_bounds("A"))
    missing, rows = (
        ("text", layout.num_text_rows) if "A" in children else ("vision", layout.num_vision_rows)
    )
    if rows:
        raise ShapeError(
            f"this model has no {missing} branch, but the batch has {rows} {missing} rows; create it with "
            "modalities=('vision', 'text')"
        )
    return Route([children.get("A", children.get("B"))], layout.expert_bounds("A"))


def encoder_layer(
    layer: Any,
    x: Tensor,
    layout: TokenLayout,
    *,
    mask: str | Tensor = "bidirectional",
    read: Selection | None = None,
    drop_path_rate: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """x [R, C] -> [R, C], or [Rq, C] for the rows that ``read`` names.

    ``drop_path_rate`` drops whole branches per sample (stochastic depth), drawing in the caller's sample order.
    """
    attention = layer.self_attn
    own = layout if read is None else read.layout
    residual = x if read is None else x[read.rows]
    if read is None:
        q, k, v = project(layer, x, layout, "qkv", impl)
    else:
        k, v = project(layer, x, layout, "kv", impl)
        q = _linear(residual, attention.q_proj, own, layer.self_attn_layer_norm, impl=impl)
    o = shared_attention(
        q,
        k,
        v,
        layout,
        num_heads=attention.num_heads,
        mask=mask,
        queries=None if read is None else own,
        impl=impl,
    )
    keep = (own, drop_path_rate)
    x = _branch(o, attention.out_proj, attention.inner_attn_ln, residual, keep, impl)
    return feed_forward(layer, x, own, drop_path_rate, impl)


def project(
    layer: Any, x: Tensor, layout: TokenLayout, names: str, impl: str
) -> tuple[Tensor, ...]:
    """LayerNorm and the projections that ``names`` spells ("qkv" or "kv"), in one product: [R, C] each."""
    attention = layer.self_attn
    routes = [route(getattr(attention, f"{name}_proj"), layout) for name in names]
    experts = list(zip(*(own.modules for own in routes), strict=True))
    return expert_linear(
        x,
        [tuple(linear.weight for linear in own) for own in experts],
        [tuple(linear.bias for linear in own) for own in experts],
        bounds=routes[0].bounds,
        norm=_norm(layer.self_attn_layer_norm, layout),
        impl=impl,
    ).chunk(len(names), dim=1)


def attend(layer: Any, o: Tensor, residual: Tensor, layout: TokenLayout, impl: str) -> Tensor:
    """The rest of a layer after its attention o [R, C], without drop path."""
    attention = layer.self_attn
    x = _linear(o, attention.out_proj, layout, attention.inner_attn_ln, residual, impl)
    return feed_forward(layer, x, layout, 0.0, impl)


def feed_forward(
    layer: Any, x: Tensor, layout: TokenLayout, drop_path_rate: float, impl: str
) -> Tensor:
    """The second half of a layer: x + fc2(LN(gelu(fc1(LN(x))))), x [R, C]."""
    experts = route(layer.ffn, layout)
    norm = _norm(layer.final_layer_norm, layout)
    h = _experts_linear(
        x, [e.fc1 for e in experts.modules], experts.bounds, norm, "gelu", None, impl
    )
    norms = [e.ffn_layernorm for e in experts.modules]
    inner = None
    if norms[0] is not None:
        inner = Norm([n.weight for n in norms], [n.bias for n in norms], norms[0].eps)
    linears = [e.fc2 for e in experts.modules]
    scale = _drop_path(x, layout, drop_path_rate)
    if scale is None:
        return _experts_linear(h, linears, experts.bounds, inner, None, x, impl)
    return x + _experts_linear(h, linears, experts.bounds, inner, None, None, impl) * scale


def _branch(
    x: Tensor,
    linear: nn.Module,
    norm: nn.Module | None,
    residual: Tensor,
    keep: tuple[TokenLayout, float],
    impl: str,
) -> Tensor:
    layout, rate = keep
    scale = _drop_path(residual, layout, rate)
    if scale is None:
        return _linear(x, linear, layout, norm, residual, impl)
    return residual + _linear(x, linear, layout, norm, None, impl) * scale


def _linear(
    x: Tensor,
    linear: nn.Module,
    layout: TokenLayout,
    norm: nn.Module | None,
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    experts = route(linear, layout)
    inner = None if norm is None else _norm(norm, layout)
    return _experts_linear(x, experts.modules, experts.bounds, inner, None, residual, impl)


def _experts_linear(
    x: Tensor,
    linears: list[Any],
    bounds: tuple[int, ...],
    norm: Norm | None,
    activation: str | None,
    residual: Tensor | None,
    impl: str,
) -> Tensor:
    return expert_linear(
        x,
        [linear.weight for linear in linears],
        [linear.bias for linear in linears],
        bounds=bounds,
        norm=norm,
        activation=activation,
        residual=residual,
        impl=impl,
    )


def _norm(norm: nn.Module, layout: TokenLayout) -> Norm:
    modules = route(norm, layout).modules
    return Norm([n.weight for n in modules], [n.bias for n in modules], modules[0].eps)


def _drop_path(x: Tensor, layout: TokenLayout, rate: float) -> Tensor | None:
    """[R, 1]: 0 for the rows of dropped samples, 1 / (1 - rate) for the others; None for rate 0."""
    if rate == 0.0:
        return None
    kept = x.new_empty(layout.batch_size, 1, 1).bernoulli_(1.0 - rate).div_(1.0 - rate)
    return kept[layout.sample_of_row, 0]


def layer_norm(norm: nn.Module, x: Tensor, layout: TokenLayout) -> Tensor:
    """LayerNorm of every row by its own expert, [R, C] -> [R, C]."""
    experts = route(norm, layout)
    parts = [
        _norm_rows(x[start:stop], module.weight, module.bias, module.eps)
        for module, (start, stop) in zip(experts.modules, pairwise(experts.bounds), strict=True)
        if stop > start
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else x


def encode_rows(
    encoder: Any,
    x: Tensor,
    layout: TokenLayout,
    *,
    mask: str | Tensor = "bidirectional",
    read: Selection | None = None,
    drop_path_rates: Sequence[float] = (),
    hidden_states: list[Tensor] | None = None,
    checkpoint_activations: bool = False,
    impl: str = "auto",
) -> Tensor:
    """All layers and the output LayerNorm on packed rows x [R, C].

    With ``read`` only the rows that it names are computed in the last layer; the result is then [Rq, C].
    ``hidden_states`` collects x and every layer's output (all rows). ``drop_path_rates`` has one rate a layer;
    empty means none (evaluation).
    """
    if (
        hidden_states is None
        and layout.num_rows > _ROWS_AT_ONCE
        and layout.batch_size > 1
        and isinstance(mask, str)
        and x.device.type == "cpu"
        and not needs_grad(x)
        and not drop_path_rates
    ):
        return _encode_in_parts(encoder, x, layout, mask, read, impl)
    last = len(encoder.layers) - 1
    if hidden_states is not None:
        hidden_states.append(x)
    for index, layer in enumerate(encoder.layers):
        early = read if index == last and hidden_states is None else None
        options: dict[str, Any] = {
            "mask": mask,
            "read": early,
            "drop_path_rate": drop_path_rates[index] if drop_path_rates else 0.0,
            "impl": impl,
        }
        if checkpoint_activations and torch.is_grad_enabled():
            x = checkpoint(encoder_layer, layer, x, layout, use_reentrant=False, **options)
        else:
            x = encoder_layer(layer, x, layout, **options)
        if hidden_states is not None:
            hidden_states.append(x)
    if read is not None and x.shape[0] != read.layout.num_rows:
        x = x[read.rows]
    own = layout if read is None else read.layout
    return x if encoder.layer_norm is None else layer_norm(encoder.layer_norm, x, own)


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
