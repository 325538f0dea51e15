"""What the five task models have in common."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.config import BEiT3Config
from beit3_fast.errors import ShapeError
from beit3_fast.model.beit3 import BEiT3, Encoded, init_weights
from beit3_fast.model.capture import Capturable
from beit3_fast.model.embeddings import Embeddings

_HEAD_INIT_SCALE = 0.001


class BEiT3Task(Embeddings, Capturable):
    """A backbone with a head; ``config`` and ``impl`` are the backbone's."""

    def __init__(self, config: BEiT3Config, impl: str = "auto") -> None:
        super().__init__()
        self.beit3 = BEiT3(config, impl)
        self.name: str | None = None

    @property
    def config(self) -> BEiT3Config:
        """The backbone's configuration."""
        return self.beit3.config

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patch rows and columns of the position table."""
        return self.beit3.grid_size

    def get_num_layers(self) -> int:
        """Encoder layers (official helper for layer-wise learning rates)."""
        return self.config.num_layers

    def no_weight_decay(self) -> set[str]:
        """Names that the official optimizer exempts from weight decay."""
        return {
            "pos_embed",
            "cls_token",
            "beit3.encoder.embed_positions.A.weight",
            "beit3.vision_embed.cls_token",
            "logit_scale",
        }

    def _init_head(self, *small: nn.Linear) -> None:
        for name, child in self.named_children():
            if name != "beit3":
                child.apply(init_weights)
        for linear in small:
            with torch.no_grad():
                for parameter in linear.parameters():
                    parameter.mul_(_HEAD_INIT_SCALE)


def check_given(**inputs: Tensor | None) -> None:
    """Raises ShapeError for an input that a head cannot do without and that is no tensor."""
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ShapeError(f"{name} is needed, a tensor, got {type(value).__name__}")


# What the released training loops pass and no released model reads.
_READ_BY_NONE = frozenset({"image_id"})


def take_further(model: nn.Module, further: Mapping[str, Any]) -> None:
    """Takes any further keyword, as every released ``forward`` does, and warns of one that no released loop passes."""
    unknown = further.keys() - _READ_BY_NONE
    if unknown:
        warnings.warn(
            f"{type(model).__name__}.forward reads no {', '.join(sorted(unknown))}; it has "
            f"{', '.join(inspect.signature(model.forward).parameters)}",
            UserWarning,
            stacklevel=3,
        )


def text_of_all(encoded: Encoded) -> Tensor:
    """[B, C]: the first text row of every sample. Raises ShapeError where a sample has none."""
    sample = encoded.layout.sample_without_text
    if sample is not None:
        raise ShapeError(
            f"the head reads the first text token of every sample, but the text of sample {sample} of the "
            "batch is empty or all padding"
        )
    return encoded.text()
