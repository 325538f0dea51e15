"""Sizes of BEiT-3 and the checks that keep a configuration meaningful.

Released base and large checkpoints are "decoupled": every projection and every LayerNorm belongs to one
modality. The paper's 1.9B model shares attention weights between modalities and adds a vision-language
feed-forward expert to its top layers (arXiv 2208.10442, section 2.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beit3_fast.errors import ConfigError

MODALITIES = ("vision", "text")
ATTENTION_FORMS = ("decoupled", "shared")


@dataclass(frozen=True)
class BEiT3Config:
    """Everything that fixes the shapes of a BEiT-3 backbone.

    ``embed_dim``: width C of a row; ``num_heads``: attention heads, of C / num_heads each; ``ffn_dim``: width inside of
    an expert; ``num_layers``. ``img_size`` is in pixels: one number for a square image or ``(height, width)``;
    ``patch_size``: side of a patch in pixels; ``in_chans``: channels of an image. ``vocab_size``: rows of the text
    embedding; ``max_text_positions``: rows of its position table, two of them reserved. ``layer_norm_eps``: in every
    LayerNorm; ``normalize_output``: one behind the last layer. ``drop_path_rate``: of the last layer in training, from
    0 in the first, rising evenly. ``attention`` is "decoupled" (released checkpoints: one set of attention weights per
    modality) or "shared" (the paper). ``vl_expert_layers`` counts the top layers that own a third, vision-language
    expert for pairs. ``modalities`` leaves a branch out when only one is named. ``checkpoint_activations``: layers
    compute their activations again in the backward pass. Raises ConfigError when fields contradict.
    """

    embed_dim: int = 768
    num_heads: int = 12
    ffn_dim: int = 3072
    num_layers: int = 12
    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    vocab_size: int = 64010
    max_text_positions: int = 1024
    layer_norm_eps: float = 1e-5
    drop_path_rate: float = 0.0
    normalize_output: bool = True
    attention: str = "decoupled"
    vl_expert_layers: int = 0
    modalities: tuple[str, ...] = MODALITIES
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.img_size, (list, tuple)):
            object.__setattr__(self, "img_size", tuple(self.img_size))
        if isinstance(self.modalities, (list, tuple)):
            object.__setattr__(self, "modalities", tuple(self.modalities))
        counts = ("embed_dim", "num_heads", "ffn_dim", "num_layers", "patch_size", "in_chans")
        for field in (*counts, "vocab_size", "max_text_positions"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field} must be a positive integer, got {value!r}")
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim must be a multiple of num_heads, got {self.embed_dim} and {self.num_heads}"
            )
        sizes = self.img_size if isinstance(self.img_size, tuple) else (self.img_size,) * 2
        if len(sizes) != 2 or any(
            not isinstance(size, int) or size < 1 or size % self.patch_size for size in sizes
        ):
            raise ConfigError(
                f"img_size must be one or two positive multiples of patch_size {self.patch_size}, "
                f"got {self.img_size!r}"
            )
        if not isinstance(self.layer_norm_eps, float) or not 0 < self.layer_norm_eps < 1:
            raise ConfigError(f"layer_norm_eps must be in (0, 1), got {self.layer_norm_eps!r}")
        if self.max_text_positions < 3:
            raise ConfigError(
                f"max_text_positions must be at least 3 (two rows are reserved), "
                f"got {self.max_text_positions}"
            )
        if self.attention not in ATTENTION_FORMS:
            raise ConfigError(f"attention must be one of {ATTENTION_FORMS}, got {self.attention!r}")
        if not isinstance(self.drop_path_rate, (int, float)) or not 0 <= self.drop_path_rate < 1:
            raise ConfigError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate!r}")
        if (
            not isinstance(self.vl_expert_layers, int)
            or not 0 <= self.vl_expert_layers <= self.num_layers
        ):
            raise ConfigError(
                f"vl_expert_layers must be between 0 and num_layers {self.num_layers}, "
                f"got {self.vl_expert_layers}"
            )
        for field in ("normalize_output", "checkpoint_activations"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{field} must be True or False, got {getattr(self, field)!r}")
        named = self.modalities
        known = isinstance(named, tuple) and bool(named) and all(m in MODALITIES for m in named)
        if not known or len(set(named)) < len(named):
            raise ConfigError(f"modalities must be a tuple of some of {MODALITIES}, got {named!r}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head, D = C / H."""
        return self.embed_dim // self.num_heads

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        size = self.img_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of ``img_size``."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_vision_tokens(self) -> int:
        """Vision tokens of one image: the patches and the class token in front of them."""
        rows, columns = self.grid_size
        return rows * columns + 1

    def replace(self, **changes: Any) -> BEiT3Config:
        """A copy with some fields changed. Raises ConfigError for a field that does not exist."""
        _check_names(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; ``from_dict`` gives the equal configuration back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BEiT3Config:
        """Raises ConfigError for unknown fields and contradictory values."""
        _check_names(values)
        return cls(**values)


def _check_names(values: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(BEiT3Config)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"unknown configuration fields {unknown}; known are {sorted(known)}")


SIZES: dict[str, BEiT3Config] = {
    "tiny": BEiT3Config(
        embed_dim=64, num_heads=4, ffn_dim=128, num_layers=2, img_size=32, vocab_size=100
    ),
    "base": BEiT3Config(),
    "large": BEiT3Config(embed_dim=1024, num_heads=16, ffn_dim=4096, num_layers=24),
    "giant": BEiT3Config(
        embed_dim=1408,
        num_heads=16,
        ffn_dim=6144,
        num_layers=40,
        patch_size=14,
        attention="shared",
        vl_expert_layers=3,
    ),
}
