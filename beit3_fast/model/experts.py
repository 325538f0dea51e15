"""Which expert of a layer computes which rows, and with what parameters, by their official names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from beit3_fast.errors import ConfigError, ShapeError
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import ExpertNorm, Norm
from beit3_fast.ops.whole_layer import LayerOperands


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


def norm_of(modules: Sequence[Any]) -> Norm:
    """The LayerNorms of the experts of one product. Raises ConfigError where they differ in epsilon."""
    if any(module.eps != modules[0].eps for module in modules):
        raise ConfigError(
            f"the LayerNorms of a product's experts must have one eps, got {[n.eps for n in modules]}"
        )
    return Norm([n.weight for n in modules], [n.bias for n in modules], modules[0].eps)


def expert_norm(module: nn.Module, layout: TokenLayout) -> ExpertNorm:
    """A LayerNorm behind the layers, each expert with an epsilon of its own."""
    experts, bounds = route(module, layout)
    weights, biases, eps = zip(*((own.weight, own.bias, own.eps) for own in experts), strict=True)
    return ExpertNorm(weights, biases, eps, bounds)


def layer_operands(layer: Any, layout: TokenLayout, own: TokenLayout) -> LayerOperands | None:
    """The parameters of all products of a layer for the rows ``own`` of a layout, of the experts that have rows; None where
    the layer lacks one of the official ones, or where the experts of two of its modules do not agree on their rows."""
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    first = _modules(
        layout,
        layer.self_attn_layer_norm,
        *projections,
        attention.out_proj,
        attention.inner_attn_ln,
    )
    second = _modules(own, layer.ffn, layer.final_layer_norm)
    if first is None or second is None:
        return None
    (norms, *apart, out, inner), bounds = first
    (ffn, final), ffn_bounds = second
    linears = [linear for expert in zip(*apart, strict=True) for linear in expert] + out
    linears += [expert.fc1 for expert in ffn] + [expert.fc2 for expert in ffn]
    groups = (norms, inner, final, [expert.ffn_layernorm for expert in ffn])
    every = [norm for group in groups for norm in group]
    if any(norm is None for norm in every) or any(linear.bias is None for linear in linears):
        return None
    eps = [group[0].eps for group in groups]
    if any(norm.eps != one for group, one in zip(groups, eps, strict=True) for norm in group):
        return None
    own_bounds = bounds
    if own is not layout:
        among = route(layer.self_attn_layer_norm, layout).bounds
        own_bounds = _only(_used(among), route(layer.self_attn_layer_norm, own).bounds)
    return LayerOperands(
        weights=[linear.weight for linear in linears],
        biases=[linear.bias for linear in linears],
        norm_weights=[norm.weight for norm in every],
        norm_biases=[norm.bias for norm in every],
        eps=eps,
        bounds=bounds,
        own_bounds=own_bounds,
        ffn_bounds=ffn_bounds,
        num_heads=attention.num_heads,
    )


def _modules(layout: TokenLayout, *parts: Any) -> tuple[list[list[Any]], tuple[int, ...]] | None:
    """Of each part the experts that have rows, and the bounds of these; None where a part is missing or has other bounds."""
    if any(part is None for part in parts):
        return None
    routes = [route(part, layout) for part in parts]
    bounds = routes[0].bounds
    used = _used(bounds)
    if not used or any(given.bounds != bounds for given in routes):
        return None
    return [[given.modules[e] for e in used] for given in routes], _only(used, bounds)


def _used(bounds: tuple[int, ...]) -> list[int]:
    return [e for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]


def _only(experts: list[int], bounds: tuple[int, ...]) -> tuple[int, ...]:
    """The bounds of some experts, the others having no rows."""
    return (0, *(bounds[e + 1] for e in experts))
