"""Where the weights of a run come from: how they are drawn, where the official way does not suit the model's size, and what
tells one start from another."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf
from pathlib import Path

import torch
from torch import nn

from beit3_fast.data.digest import digest_of_file
from beit3_fast.errors import ConfigError


@dataclass(frozen=True)
class Initial:
    """``[initial]``: standard deviations of the first weights, heads included; None draws them as the official code does.

    ``linear``: of the matrices of linear layers. Officially 0.0108 (0.02, cut at 0.02) at any width, which suits base (768): at
    width C a branch then adds ``(C / 768) ** 0.5`` times as much to the residual stream. ``C ** -0.5`` keeps the size of rows.
    ``patches``: of the projection of patches. Officially ``1 / (3 * patch_size)``, which leaves little of what differs between the
    patches of an image beside what such branches add. ``image_positions`` and ``text_positions``: of the position tables.
    Officially 1, beside words of ``C ** -0.5`` and patches below 1: large data teach to see past that, a short run does not.
    Raises ConfigError for what is no positive number.
    """

    linear: float | None = None
    patches: float | None = None
    image_positions: float | None = None
    text_positions: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < inf):
                raise ConfigError(f"{field.name} must be a positive number, got {value!r}")

    @torch.no_grad()
    def draw(self, model: nn.Module) -> None:
        """Draw the weights of a model with ``beit3``, a BEiT3, anew, with PyTorch's random numbers; those of fields that are None stay."""
        tables = {"A": self.image_positions, "B": self.text_positions}
        for name, module in model.named_modules():
            std = None
            if isinstance(module, nn.Linear):
                std = self.linear
            elif isinstance(module, nn.Conv2d):
                std = self.patches
            elif isinstance(module, nn.Embedding):
                before, _, last = name.rpartition(".")
                std = tables.get(last) if before.endswith("embed_positions") else None
            if std is not None:
                nn.init.normal_(module.weight, std=std)


def start_of(checkpoint: Path | None, initial: Initial | None = None) -> dict[str, str]:
    """What first weights depend on beside the seed and the model's sizes, in words, for ``train``.

    Of the file ``checkpoint`` its content counts, not its name. The weights themselves would differ where another device or
    version of PyTorch draws them, on which a run may go on.
    """
    file = "none, from scratch" if checkpoint is None else f"sha256 {digest_of_file(checkpoint)}"
    start = {"[model] checkpoint": file}
    if initial is not None:
        own = (f"{field.name}={getattr(initial, field.name)}" for field in fields(initial))
        start["[initial]"] = ", ".join(own)
    return start
