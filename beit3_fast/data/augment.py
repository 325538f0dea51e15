"""Other views of an image: cut, mirrored, in other colours, turned."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from beit3_fast.data.rand_augment import rand_augment
from beit3_fast.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

_ASPECT = 4 / 3
_ATTEMPTS = 10


@dataclass(frozen=True)
class Augment:
    """How images are changed before they are resized; the default leaves them as they are.

    ``crop``: least share of the area that is kept, the share is drawn from it to 1 and the aspect from 3/4 to 4/3; the paper has 0.5
    with its text, BEiT 0.2. ``flip``: chance of a mirror image, which makes captions wrong that say left and right. ``jitter``:
    brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter (the paper: 0.4). ``randaugment``: how many
    operations of RandAugment are drawn (the official fine-tuning: 2); ``magnitude``: how far they go, of the official range (there:
    0.7). Raises ConfigError for values outside of 0 to 1, and for a number of operations that is not 0 or more.
    """

    crop: float = 1.0
    flip: float = 0.0
    jitter: float = 0.0
    randaugment: int = 0
    magnitude: float = 0.7

    def __post_init__(self) -> None:
        if type(self.randaugment) is not int or self.randaugment < 0:
            raise ConfigError(
                f"randaugment must be a number of operations, 0 or more, got {self.randaugment!r}"
            )
        for field in fields(self):
            if field.name == "randaugment":
                continue
            value = getattr(self, field.name)
            if (
                not isinstance(value, (int, float))
                or isinstance(value, bool)
                or not 0 <= value <= 1
            ):
                raise ConfigError(f"{field.name} must be a number in [0, 1], got {value!r}")

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """A view of an RGB image, drawn by ``generator``."""
        from PIL import Image, ImageEnhance

        if self.crop < 1:
            image = image.crop(self._box(image.width, image.height, generator))
        if generator.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                factor = generator.uniform(1 - self.jitter, 1 + self.jitter)
                image = change(image).enhance(factor)
        return rand_augment(image, self.randaugment, self.magnitude, generator)

    def _box(
        self, width: int, height: int, generator: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Left, top, right, bottom; the whole image where none of a few boxes fits."""
        for _ in range(_ATTEMPTS):
            area = generator.uniform(self.crop, 1) * width * height
            aspect = math.exp(generator.uniform(-math.log(_ASPECT), math.log(_ASPECT)))
            own_width, own_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < own_width <= width and 0 < own_height <= height:
                left = int(generator.integers(width - own_width + 1))
                top = int(generator.integers(height - own_height + 1))
                return left, top, left + own_width, top + own_height
        return 0, 0, width, height
