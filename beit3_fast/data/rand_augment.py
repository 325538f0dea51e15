"""RandAugment (arXiv 1909.13719) as BEiT-3's fine-tuning has it: ten operations, each drawn with equal chance.

Ranges are those of the official recipe, where magnitude 10 of 10 is the end of each range; Pillow computes the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_CHANCE = 0.5  # that a drawn operation is applied
_GREY = (128, 128, 128)  # what comes into view
_MOST_SHEAR = 0.3
_MOST_DEGREES = 30.0
# The official 10 pixels of an image that is 480 wide; here images are not resized yet.
_MOST_SHIFT = 10 / 480

Change = Callable[["Image.Image", float, float], "Image.Image"]


def rand_augment(
    image: Image.Image, operations: int, magnitude: float, generator: np.random.Generator
) -> Image.Image:
    """``operations`` draws, each applied to an RGB image or not with equal chance; ``magnitude`` in [0, 1]."""
    names = sorted(CHANGES)
    for _ in range(operations):
        name = names[int(generator.integers(len(names)))]
        sign = 1.0 if generator.random() < 0.5 else -1.0
        if generator.random() < _CHANCE:
            image = CHANGES[name](image, magnitude, sign)
    return image


def _enhance(kind: str) -> Change:
    def change(image: Image.Image, magnitude: float, sign: float) -> Image.Image:
        from PIL import ImageEnhance

        enhanced: Image.Image = getattr(ImageEnhance, kind)(image).enhance(0.1 + 1.8 * magnitude)
        return enhanced

    return change


def _tones(kind: str) -> Change:
    def change(image: Image.Image, magnitude: float, sign: float) -> Image.Image:
        from PIL import ImageOps

        toned: Image.Image = getattr(ImageOps, kind)(image)
        return toned

    return change


def _affine(image: Image.Image, row: tuple[float, ...]) -> Image.Image:
    from PIL import Image

    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        row,
        resample=Image.Resampling.BILINEAR,
        fillcolor=_GREY,
    )


def _rotate(image: Image.Image, magnitude: float, sign: float) -> Image.Image:
    from PIL import Image

    angle = sign * _MOST_DEGREES * magnitude
    return image.rotate(angle, resample=Image.Resampling.BILINEAR, fillcolor=_GREY)


CHANGES: dict[str, Change] = {
    "identity": lambda image, magnitude, sign: image,
    "autocontrast": _tones("autocontrast"),
    "equalize": _tones("equalize"),
    "brightness": _enhance("Brightness"),
    "sharpness": _enhance("Sharpness"),
    "rotate": _rotate,
    "shear_x": lambda image, m, sign: _affine(image, (1, sign * _MOST_SHEAR * m, 0, 0, 1, 0)),
    "shear_y": lambda image, m, sign: _affine(image, (1, 0, 0, sign * _MOST_SHEAR * m, 1, 0)),
    "translate_x": lambda image, m, sign: _affine(
        image, (1, 0, sign * _MOST_SHIFT * m * image.width, 0, 1, 0)
    ),
    "translate_y": lambda image, m, sign: _affine(
        image, (1, 0, 0, 0, 1, sign * _MOST_SHIFT * m * image.height)
    ),
}
"""Operation -> what it does to an RGB image, given a magnitude in [0, 1] and a sign for those that have two directions."""
