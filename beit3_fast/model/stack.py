"""The layers of a model, whatever it is: what FSDP2 shards one by one, and activation checkpointing computes again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from beit3_fast.errors import ConfigError

T = TypeVar("T")


class Stack(nn.Module, ABC):
    """Layers one above the other. ``recompute`` says of each what the backward pass computes again instead of keeping it: "none",
    "ffn" or "layer"; empty means nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute: tuple[str, ...] = ()

    @abstractmethod
    def in_order(self) -> nn.ModuleList:
        """The layers, the first one first; each is called as a module."""


def computed(part: Callable[..., T], *given: Any, again: bool, **options: Any) -> T:
    """What ``part`` returns. With ``again`` the backward pass computes it again instead of keeping what it needs."""
    if again and torch.is_grad_enabled():
        return cast(T, checkpoint(part, *given, use_reentrant=False, **options))
    return part(*given, **options)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of all stacks of a model, by their names in it."""
    layers = {layer for stack in _stacks(model) for layer in stack.in_order()}
    return {name: module for name, module in model.named_modules() if module in layers}


def set_recompute(model: nn.Module, what: str | int) -> None:
    """Have the backward pass compute again the "ffn" of each layer, each "layer", every ``what``-th layer, or "none".

    Layers are counted through all stacks of the model. Raises ConfigError where it has none, or fewer than ``what``.
    """
    stacks = _stacks(model)
    layers = sum(len(stack.in_order()) for stack in stacks)
    if not layers:
        raise ConfigError(
            f"nothing of {type(model).__name__} can be recomputed, it has no layers that are known; leave "
            'checkpoint_activations at "none"'
        )
    if not isinstance(what, str) and what > layers:
        raise ConfigError(
            f"every {what}th layer cannot be recomputed: the model has {layers} layers"
        )
    numbers = count(1)
    for stack in stacks:
        stack.recompute = tuple(_of_layer(next(numbers), what) for _ in stack.in_order())


def _of_layer(number: int, what: str | int) -> str:
    if isinstance(what, str):
        return what
    return "none" if number % what else "layer"


def _stacks(model: nn.Module) -> list[Stack]:
    return [module for module in model.modules() if isinstance(module, Stack)]
