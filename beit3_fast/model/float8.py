"""What dtype="float8" makes of a model: its products in 8 bits, the LayerNorm in front of each moved into its weights.

Rows are rounded by the op that writes them, before anyone has normalised them. LayerNorm's weight and bias therefore
go into the product behind it (W gamma, b + W beta), in fp32 and before anything is rounded; what is left of LayerNorm
are mean and deviation, which the product takes care of. As functions both models are the same, so the state dict of
one fits the other.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.ops.packed_weight import keep_packed, quantize_float8

_BRANCHES = ("", ".A", ".B", ".C")


def norms_and_products() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names within a layer: of each LayerNorm, and of the products that read what it gives."""
    for branch in _BRANCHES:
        projections = tuple(f"self_attn.{name}_proj{branch}" for name in "qkv")
        yield f"self_attn_layer_norm{branch}", projections
        yield f"self_attn.inner_attn_ln{branch}", (f"self_attn.out_proj{branch}",)
        yield f"final_layer_norm{branch}", (f"ffn{branch}.fc1",)
        yield f"ffn{branch}.ffn_layernorm", (f"ffn{branch}.fc2",)


def absorb_norms(state: MutableMapping[str, Any], prefix: str = "") -> None:
    """Moves LayerNorm's weight and bias into the products behind it, in the entries of one layer.

    A LayerNorm stays as it is where an entry of its products is missing.
    """
    for norm, products in norms_and_products():
        names = [f"{prefix}{norm}.{part}" for part in ("weight", "bias")]
        own = [[f"{prefix}{product}.{part}" for part in ("weight", "bias")] for product in products]
        if not all(name in state for pair in (names, *own) for name in pair):
            continue
        gamma, beta = (state[name].detach().float() for name in names)
        for weight, bias in own:
            plain = state[weight].detach().float()
            state[bias] = state[bias].detach().float() + plain @ beta
            state[weight] = plain * gamma
        state[names[0]] = torch.ones_like(gamma)
        state[names[1]] = torch.zeros_like(beta)


def to_float8(model: Any, layers: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Rounds the weights of ``layers``, those of the model, in place; ``dtype`` is that of all else."""
    model.eval().requires_grad_(False)
    for layer in layers.children():
        state = dict(layer.state_dict())
        absorb_norms(state)
        rounded = {}
        for name, linear in layer.named_modules():
            if isinstance(linear, nn.Linear):
                rounded[linear] = quantize_float8(state.pop(f"{name}.weight"), dtype)
        layer.load_state_dict(state, strict=False)
        for linear, weight in rounded.items():
            keep_packed(linear, weight)
        layer.register_load_state_dict_pre_hook(_before_loading)
    return model.to(dtype)


def _before_loading(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
    absorb_norms(state, prefix)
