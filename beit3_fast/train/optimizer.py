"""AdamW with the groups of the official fine-tuning: layer-wise rates, and no weight decay where it does harm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.errors import ConfigError
from beit3_fast.train.options import TrainOptions

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_HEAD = "head."
_FIRST = ("cls_token", "mask_token", "pos_embed")


def layer_of(name: str, num_layers: int) -> int:
    """0 for embeddings, positions and their tokens, n + 1 for encoder layer n, num_layers + 1 for all above."""
    if "embed" in name or name.rpartition(".")[2] in _FIRST:
        return 0
    found = _LAYER.search(name)
    return num_layers + 1 if found is None else int(found[1]) + 1


def parameter_groups(model: nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with ``lr_scale``, ``weight_decay`` and the ``names`` of its parameters.

    Not decayed: vectors and scalars, biases, and what ``model.no_weight_decay()`` names. A layer's rate is
    layer_decay ** (layers above it); that of ``head`` is multiplied with ``head_lr_scale``, too. Raises ConfigError for a model without parameters to train.
    """
    layers: Any = getattr(model, "get_num_layers", None)
    if layers is None and options.layer_decay != 1.0:
        raise ConfigError(
            f"layer_decay needs a model with get_num_layers(), got {type(model).__name__}"
        )
    num_layers = 0 if layers is None else layers()
    exempt: Any = getattr(model, "no_weight_decay", set)()
    groups: dict[tuple[int, bool, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, num_layers)
        decays = parameter.dim() > 1 and not name.endswith(".bias") and name not in exempt
        in_head = name.startswith(_HEAD)
        scale = options.layer_decay ** (num_layers + 1 - layer)
        group = groups.setdefault(
            # Single numbers by themselves: with FSDP2 they alone are whole, and no group may have both.
            (layer, decays, in_head, not parameter.dim()),
            {
                "params": [],
                "names": [],
                "lr_scale": scale * (options.head_lr_scale if in_head else 1.0),
                "weight_decay": options.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ConfigError("the model has no parameters to train")
    return [groups[key] for key in sorted(groups)]


class Optimizer:
    """AdamW, whose state exists from the start, so that a checkpoint can be read straight into it."""

    def __init__(self, model: nn.Module, options: TrainOptions) -> None:
        self.options = options
        groups = parameter_groups(model, options)
        self.names = [name for group in groups for name in group["names"]]
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        device = self.parameters[0].device
        self.adamw = torch.optim.AdamW(
            [{k: v for k, v in group.items() if k != "names"} for group in groups],
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            fused=device.type in ("cuda", "cpu") or None,
        )
        for parameter in self.parameters:
            step = torch.zeros((), device=device if device.type == "cuda" else "cpu")
            self.adamw.state[parameter] = {
                "step": step,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, number: int) -> float:
        """Change the weights with the rate of step ``number``, which is returned."""
        rate = self.options.rate(number)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.adamw.step()
        return rate

    def state(self) -> dict[str, Tensor]:
        """The tensors themselves, under the parameters' names."""
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, tensor in self.adamw.state[parameter].items():
                yield f"{name}.{key}", tensor
