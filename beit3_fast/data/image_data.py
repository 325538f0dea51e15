"""ImageData: the micro-batches of a run that sees nothing but images, each a function of its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from beit3_fast.data.augment import Augment
from beit3_fast.data.digest import digest_of
from beit3_fast.data.images import load_image, preprocess_image
from beit3_fast.data.masking import sample_generator, sample_order
from beit3_fast.data.presets import ImagePreset
from beit3_fast.errors import ConfigError, InputError

_ORDER, _VIEW = range(2)


@dataclass(frozen=True)
class ImageBatch:
    """``images`` [B, 3, H, W]."""

    images: Tensor

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.images)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ImageBatch:
        """A copy on ``device``, in ``dtype``."""
        return ImageBatch(self.images.to(device, dtype, non_blocking=True))


class ImageData:
    """``data[n]`` is micro-batch n of a run without end: an ImageBatch of ``batch_size`` images of ``pixels`` x ``pixels``.

    Every image comes once an epoch, in an order shuffled anew each time. Raises ConfigError and InputError for what does not
    fit.
    """

    def __init__(
        self,
        paths: Sequence[str],
        batch_size: int,
        pixels: int,
        preset: str | ImagePreset = "square",
        seed: int = 0,
        augment: Augment | None = None,
    ) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise ConfigError(f"batch_size must be a positive integer, got {batch_size!r}")
        if not paths:
            raise InputError("expected at least one image, got none")
        self.paths, self.batch_size, self.pixels = list(paths), batch_size, pixels
        self.preset = ImagePreset.get(preset)
        self.seed = seed
        self.augment = augment or Augment()

    def __getitem__(self, number: int) -> ImageBatch:
        images = []
        for place in range(number * self.batch_size, (number + 1) * self.batch_size):
            epoch, within = divmod(place, len(self.paths))
            index = int(sample_order(len(self.paths), self.seed, _ORDER, epoch)[within])
            image = load_image(self.paths[index], background=self.preset.background)
            view = self.augment(image, sample_generator(self.seed, _VIEW, epoch, index))
            images.append(preprocess_image(view, self.pixels, self.preset))
        return ImageBatch(torch.stack(images))

    @property
    def identity(self) -> str:
        """A digest of what the batches are made of, so that a run is not continued with other data; of the files their names
        count, not their folders or pixels."""
        made_of = (
            [Path(path).name for path in self.paths],
            self.batch_size,
            self.pixels,
            self.preset,
            self.seed,
            self.augment,
        )
        return digest_of(repr(made_of))
