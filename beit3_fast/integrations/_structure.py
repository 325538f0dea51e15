"""What of a torchscale encoder the packed computation can replace, and what it must leave alone.

Modules are recognised by class names, part names and settings, so vendored copies of torchscale count too. A
part that is not known, a hook or a replaced forward is an obstacle: it would have no effect on the fast path.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import nn

ENCODER_PARTS = frozenset(
    {
        "embed_tokens",
        "embed_positions",
        "output_projection",
        "layernorm_embedding",
        "layers",
        "layer_norm",
        "relative_position",
        "dropout_module",
    }
)
# Called as modules, with whatever hooks and classes they have.
_CALLED_PARTS = frozenset({"embed_tokens", "output_projection"})


class _Part(NamedTuple):
    """What a part of a module must be: a class name, "linear" or "norm", and whether there is one per expert."""

    kind: str
    per_expert: bool = False
    optional: bool = False


_LINEAR, _NORM, _DROPOUT = _Part("linear"), _Part("norm"), _Part("Dropout")
_EXPERT_LINEAR, _EXPERT_NORM = _Part("linear", per_expert=True), _Part("norm", per_expert=True)
_LAYER_PARTS = {
    "self_attn": _Part("MultiheadAttention"),
    "self_attn_layer_norm": _EXPERT_NORM,
    "dropout_module": _DROPOUT,
    "drop_path": _Part("DropPath", optional=True),
    "ffn": _Part("FeedForwardNetwork", per_expert=True),
    "final_layer_norm": _EXPERT_NORM,
}
_ATTENTION_PARTS = {
    "k_proj": _EXPERT_LINEAR,
    "v_proj": _EXPERT_LINEAR,
    "q_proj": _EXPERT_LINEAR,
    "out_proj": _EXPERT_LINEAR,
    "inner_attn_ln": _Part("norm", per_expert=True, optional=True),
    "dropout_module": _DROPOUT,
}
_FFN_PARTS = {
    "activation_dropout_module": _DROPOUT,
    "dropout_module": _DROPOUT,
    "fc1": _LINEAR,
    "fc2": _LINEAR,
    "ffn_layernorm": _Part("norm", optional=True),
}
_PARTS_OF = {
    "MultiheadAttention": _ATTENTION_PARTS,
    "FeedForwardNetwork": _FFN_PARTS,
    "DropPath": {},
}
_SETTINGS_OF = {
    "EncoderLayer": ("alpha", "normalize_before", "drop_path"),
    "MultiheadAttention": ("num_heads", "head_dim", "scaling"),
    "FeedForwardNetwork": ("activation_fn",),
    "DropPath": ("drop_prob",),
}
# Of Encoder.forward. Older versions lack the last ones.
_ARGUMENTS = (
    "src_tokens",
    "encoder_padding_mask",
    "attn_mask",
    "return_all_hiddens",
    "token_embeddings",
    "multiway_split_position",
    "features_only",
    "incremental_state",
    "positions",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_encoder(module: nn.Module) -> bool:
    """Whether a module is torchscale's Encoder, or a copy or subclass of it."""
    named = any(cls.__name__ == "Encoder" for cls in type(module).__mro__)
    return (
        named
        and isinstance(module._modules.get("layers"), nn.ModuleList)
        and hasattr(module, "forward_embedding")
    )


class Structure:
    """One look at an encoder: what stands in the way, and a state to see later whether it is still true.

    ``obstacles`` are the reasons against the fast path that do not depend on a call; ``checkpointed`` says
    whether fairscale's activation checkpointing wraps the layers; ``classes`` are those whose code is replaced.
    Holds the encoder's parts and not the encoder, whose ``forward`` holds this.
    """

    def __init__(self, encoder: Any) -> None:
        watched: list[tuple[str, nn.Module]] = []
        for name, part in encoder._modules.items():
            if part is not None and name not in _CALLED_PARTS:
                watched += part.named_modules(prefix=name)
        self._dicts = [module.__dict__ for _, module in watched]
        self._modules = [module for _, module in watched]
        self._hooks = [module.__dict__[hooks] for module in self._modules for hooks in _HOOKS]
        self._parameters = [own for module in self._modules if (own := module._parameters)]
        self._children = [encoder._modules, *(module._modules for module in self._modules)]
        self._state = self._read(encoder)
        tables = "embed_positions."  # Called as modules, as they are.
        replaced = (type(module) for name, module in watched if not name.startswith(tables))
        self.classes = frozenset({type(encoder), *replaced})
        wraps = [_checkpoint_wrap(layer) for layer in encoder.layers]
        self.checkpointed = bool(wraps) and all(wrap == "plain" for wrap in wraps)
        self.obstacles = list(dict.fromkeys(_obstacles(encoder, watched, self.checkpointed)))
        self._dropouts: list[Any] = [
            m for m in self._modules if type(m).__name__ == "Dropout" and hasattr(m, "p")
        ]
        self._layers = list(encoder.layers)
        self._norms = [] if self.obstacles else list(_norms_of(self._layers))
        self._multiways: list[Any] = [m for m in self._modules if hasattr(m, "split_position")]

    def _read(self, encoder: Any) -> tuple[Any, ...]:
        return (
            type(encoder),
            encoder.__dict__.get("forward_embedding"),
            [layer.__dict__.get("residual_connection") for layer in encoder.layers],
            [(own.get("weight") is None, own.get("bias") is None) for own in self._parameters],
            any(self._hooks),
            [type(module) for module in self._modules],
            [vars_.get("forward") for vars_ in self._dicts],
            [tuple(children.values()) for children in self._children],
        )

    def is_current(self, encoder: Any) -> bool:
        """Whether no module, class, hook or instance-level forward has changed since."""
        return self._read(encoder) == self._state

    def setting_obstacle(self) -> str | None:
        """A setting, train mode included, that the fast path cannot follow now."""
        for dropout in self._dropouts:
            if dropout.training and dropout.p > 0:
                return f"dropout of {dropout.p} in train mode"
        for image, text in self._norms:
            if image.eps != text.eps:
                return f"experts whose LayerNorms differ in eps, {image.eps} and {text.eps}"
        for layer in self._layers:
            attention = layer.self_attn
            if layer.alpha != 1.0:
                return "a scaled residual (DeepNorm)"
            if not layer.normalize_before:
                return "LayerNorm after the residual (normalize_before=False)"
            if abs(attention.scaling * attention.head_dim**0.5 - 1) > 1e-6:
                return f"attention scaled by {attention.scaling}"
            if getattr(attention, "xpos", None) is not None:
                return "xPos relative positions"
            for ffn in layer.ffn._modules.values():
                if ffn.activation_fn is not F.gelu:
                    return "an activation that is not torch.nn.functional.gelu"
            drop_path = layer.drop_path
            if drop_path is not None and drop_path.training:
                if not 0 <= drop_path.drop_prob < 1:
                    return f"a drop path rate of {drop_path.drop_prob}"
                if not getattr(drop_path, "scale_by_keep", True):
                    return "drop path without rescaling"
        return None

    def drop_path_rates(self) -> list[float]:
        """One rate a layer as it applies now, or nothing when no branch can be dropped."""
        paths = [layer.drop_path for layer in self._layers]
        rates = [float(p.drop_prob) if p is not None and p.training else 0.0 for p in paths]
        return rates if any(rates) else []

    def stored_split(self) -> int | None:
        """The split position that all Multiway modules hold, or None when they differ."""
        splits = {module.split_position for module in self._multiways}
        return splits.pop() if len(splits) == 1 else None

    def store_split(self, split: int) -> None:
        """What torchscale does in every forward: write the split position into all Multiway modules."""
        for module in self._multiways:
            module.split_position = split


def _norms_of(layers: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The LayerNorms of both experts that one product takes with one epsilon."""
    for layer in layers:
        pair = layer.ffn._modules
        own = (layer.self_attn_layer_norm, layer.final_layer_norm, layer.self_attn.inner_attn_ln)
        yield from ((norm._modules["A"], norm._modules["B"]) for norm in own if norm is not None)
        if pair["A"].ffn_layernorm is not None and pair["B"].ffn_layernorm is not None:
            yield pair["A"].ffn_layernorm, pair["B"].ffn_layernorm


def _checkpoint_wrap(layer: nn.Module) -> str | None:
    """None: no instance-level forward; "plain": fairscale's checkpointing; "other": something else."""
    forward = layer.__dict__.get("forward")
    if forward is None:
        return None
    if not isinstance(forward, partial) or forward.func.__name__ != "_checkpointed_forward":
        return "other"
    own, reference, offload = (*forward.args, None, None, None)[:3]
    plain = own is type(layer).forward and reference() is layer and offload is False
    return "plain" if plain and not forward.keywords else "other"


def _obstacles(
    encoder: Any, watched: list[tuple[str, nn.Module]], checkpointed: bool
) -> Iterator[str]:
    for name, module in watched:
        if any(module.__dict__[hooks] for hooks in _HOOKS):
            yield f"a hook on {name}"
        if "forward" in module.__dict__ and not (checkpointed and _is_layer_name(name)):
            yield f"{name} has a forward of its own"
    parameters = inspect.signature(type(encoder).forward).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD][1:]
    if len(names) < 6 or names != list(_ARGUMENTS[: len(names)]):
        yield f"the encoder's forward has another signature: {names}"
    for name in encoder._modules:
        if name not in ENCODER_PARTS:
            yield f"an unknown part {name} of the encoder"
    for name in ("layernorm_embedding", "relative_position"):
        if getattr(encoder, name, None) is not None:
            yield f"the encoder has a {name}"
    if "forward_embedding" in encoder.__dict__:
        yield "the encoder has a forward_embedding of its own"
    dropout = encoder._modules.get("dropout_module")
    if dropout is not None:
        yield from _one("dropout_module", dropout, "Dropout")
    if encoder._parameters or encoder._buffers:
        yield "the encoder has parameters or buffers of its own"
    if not isinstance(getattr(encoder, "embed_scale", None), (int, float)):
        yield "the encoder has no embed_scale"
    positions = encoder._modules.get("embed_positions")
    if positions is not None:
        if type(positions).__name__ not in ("MutliwayEmbedding", "MultiwayEmbedding"):
            yield f"embed_positions is a {type(positions).__name__}, not a Multiway of tables"
        elif set(positions._modules) != {"A", "B"}:
            yield "embed_positions has other parts than A and B"
    elif getattr(encoder, "embed_positions", None) is not None:
        yield "embed_positions is not a module"
    if encoder._modules.get("layer_norm") is not None:
        yield from _per_expert("layer_norm", encoder.layer_norm, "norm")
    if not encoder.layers:
        yield "the encoder has no layers"
    for index, layer in enumerate(encoder.layers):
        yield from _layer_obstacles(f"layers.{index}", layer)


def _is_layer_name(name: str) -> bool:
    return name.startswith("layers.") and name.count(".") == 1


def _layer_obstacles(name: str, layer: nn.Module) -> Iterator[str]:
    if "moe_layer" in layer._modules:
        yield f"{name} is a mixture of experts"
    elif type(layer).__name__ != "EncoderLayer":
        yield f"{name} is a {type(layer).__name__}, not an EncoderLayer"
    else:
        if "residual_connection" in layer.__dict__:
            yield f"{name} has a residual_connection of its own"
        yield from _inside(name, layer, _LAYER_PARTS)


def _inside(name: str, module: nn.Module, known: dict[str, _Part]) -> Iterator[str]:
    """Obstacles in a module that must have exactly the known parts, no parameters and some settings."""
    if module._parameters or module._buffers:
        yield f"{name} has parameters or buffers of its own"
    for setting in _SETTINGS_OF[type(module).__name__]:
        if not hasattr(module, setting):
            yield f"{name} has no {setting}"
    for part, child in module._modules.items():
        if part not in known and child is not None:
            yield f"{name} has an unknown part {part}"
    for part, wanted in known.items():
        child = module._modules.get(part)
        if child is None:
            if not wanted.optional:
                yield f"{name} has no {part}"
        elif wanted.per_expert:
            yield from _per_expert(f"{name}.{part}", child, wanted.kind)
        else:
            yield from _one(f"{name}.{part}", child, wanted.kind)


def _per_expert(name: str, module: nn.Module, kind: str) -> Iterator[str]:
    """A Multiway with one module of a kind per modality."""
    if type(module).__name__ != "MultiwayNetwork":
        yield f"{name} is a {type(module).__name__}, not a MultiwayNetwork"
        return
    if getattr(module, "dim", None) != 1 or not hasattr(module, "split_position"):
        yield f"{name} does not split along dimension 1"
    experts = module._modules
    if set(experts) != {"A", "B"}:
        yield f"{name} has other parts than A and B"
        return
    if (experts["A"] is None) or (experts["B"] is None):
        yield f"{name} has lost an expert"
        return
    for expert, child in experts.items():
        if child is not None:
            yield from _one(f"{name}.{expert}", child, kind)


def _one(name: str, module: nn.Module, kind: str) -> Iterator[str]:
    label = type(module).__name__
    if kind == "linear":
        if type(module) is not nn.Linear:
            yield f"{name} is a {label}, not a torch.nn.Linear"
        elif module._parameters.get("bias") is None:
            yield f"{name} has no bias"
    elif kind == "norm":
        if type(module) is not nn.LayerNorm and label != "FusedLayerNorm":
            yield f"{name} is a {label}, not a LayerNorm"
        elif module._parameters.get("weight") is None or module._parameters.get("bias") is None:
            yield f"{name} has no weight or no bias"
    elif label != kind:
        yield f"{name} is a {label}, not a {kind}"
    elif kind in _PARTS_OF:
        yield from _inside(name, module, _PARTS_OF[kind])
