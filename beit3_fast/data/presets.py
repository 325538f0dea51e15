"""ImagePreset: how pixels become model input; it travels with a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beit3_fast.errors import ConfigError

RESIZES = ("squash", "crop")
MAX_SIDE = 16_384
"""Pixels; an image of this size takes 3 GiB as model input."""

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")


@dataclass(frozen=True)
class ImagePreset:
    """The recipe from an RGB image to a normalised tensor; the size is not part of it.

    ``resize`` is "squash" (to the target, aspect ratio not kept) or "crop" (aspect ratio kept, shorter side to
    size / crop_pct, centre cut out). ``mean`` and ``std`` belong to R, G, B in [0, 1]; ``background`` in 0..255
    lies under transparent pixels. Raises ConfigError when a field makes no sense.
    """

    name: str = "square"
    resize: str = "squash"
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        for field in ("mean", "std", "background"):
            values = getattr(self, field)
            kinds = (int,) if field == "background" else (int, float)
            if (
                not isinstance(values, (tuple, list))
                or len(values) != 3
                or not all(_is_number(value, kinds) for value in values)
            ):
                raise ConfigError(f"{field} must be three finite numbers, got {values!r}")
            # JSON has lists only, and a preset must stay hashable.
            object.__setattr__(self, field, tuple(values))
        if min(self.std) <= 0:
            raise ConfigError(f"std must be positive, got {self.std}")
        if not all(0 <= value <= 255 for value in self.background):
            raise ConfigError(f"background must be three integers in 0..255, got {self.background}")
        if self.resize not in RESIZES:
            raise ConfigError(f"resize must be one of {RESIZES}, got {self.resize!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"interpolation must be one of {INTERPOLATIONS}, got {self.interpolation!r}"
            )
        if not _is_number(self.crop_pct, (int, float)) or not 0 < self.crop_pct <= 1:
            raise ConfigError(f"crop_pct must be in (0, 1], got {self.crop_pct!r}")
        if not isinstance(self.name, str):
            raise ConfigError(f"name must be a str, got {self.name!r}")

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; ``from_dict`` gives the equal preset back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImagePreset:
        """Raises ConfigError for unknown fields and values that make no sense."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"expected a dictionary of preset fields, got {values!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ConfigError(f"unknown preset fields {unknown}; known are {known}")
        return cls(**values)

    @classmethod
    def get(cls, preset: str | ImagePreset | Mapping[str, Any]) -> ImagePreset:
        """A preset by its official name, from its dictionary, or itself. Raises ConfigError."""
        if isinstance(preset, ImagePreset):
            return preset
        if isinstance(preset, Mapping):
            return cls.from_dict(preset)
        if isinstance(preset, str) and preset in PRESETS:
            return PRESETS[preset]
        raise ConfigError(
            f"preset must be one of {list(PRESETS)} or an ImagePreset, got {preset!r}"
        )


def image_size_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) from one number or a pair. Raises ConfigError unless both are positive integers."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(
        _is_number(side, (int,)) and 0 < side <= MAX_SIDE for side in pair
    ):
        raise ConfigError(
            f"image_size must be a positive integer of at most {MAX_SIDE} or a pair (height, width), got {size!r}"
        )
    return pair


def _is_number(value: Any, kinds: tuple[type[int] | type[float], ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


PRESETS = {
    # Every released vision-language model.
    "square": ImagePreset(),
    # The released ImageNet classifiers.
    "imagenet": ImagePreset(
        name="imagenet", resize="crop", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
}
