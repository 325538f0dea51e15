"""Weights averaged over the steps of a run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit3_fast.train.parallel import local


class Average:
    """Exponential moving average of a model's parameters: shadow = decay * shadow + (1 - decay) * weight."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        for name, parameter in model.named_parameters():
            local(self.shadow[name]).lerp_(local(parameter), 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """The tensors themselves, under the parameters' names."""
        return self.shadow
