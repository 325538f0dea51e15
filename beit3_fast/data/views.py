"""Views: the image files of a training run as what goes into the model, each decoded once where there is room to keep it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from beit3_fast.data.augment import Augment
from beit3_fast.data.images import load_image, preprocess_image
from beit3_fast.data.processor import Processor
from beit3_fast.errors import ConfigError


class Views:
    """``views(path, luck)``: the file as float32 [3, H, W], prepared as ``processor`` says and changed by ``augment`` with the random
    numbers that ``luck`` makes; without ``luck`` unchanged.

    The first ``keep`` files stay in memory as tensors, in each process that prepares batches (four bytes for
    each number). Raises ConfigError for a ``keep`` that is no integer of at least 0 or goes with ``augment``, whose views are new each time.
    """

    def __init__(self, processor: Processor, augment: Augment | None = None, keep: int = 0) -> None:
        if type(keep) is not int or keep < 0:
            raise ConfigError(f"keep_images must be an integer of at least 0, got {keep!r}")
        self.processor, self.augment, self.keep = processor, augment or Augment(), keep
        self.changes = self.augment != Augment()
        if keep and self.changes:
            raise ConfigError("keep_images keeps unchanged images; leave it out, or [augment]")
        self._kept: dict[str, Tensor] = {}

    def __call__(self, path: str, luck: Callable[[], np.random.Generator] | None = None) -> Tensor:
        """Raises InputError for what cannot be read."""
        kept = self._kept.get(path)
        if kept is not None:
            return kept
        processor = self.processor
        image = load_image(
            path, background=processor.preset.background, max_pixels=processor.max_pixels
        )
        if luck is not None and self.changes:
            image = self.augment(image, luck())
        prepared = preprocess_image(image, processor.image_size, processor.preset)
        if len(self._kept) < self.keep:
            self._kept[path] = prepared
        return prepared
