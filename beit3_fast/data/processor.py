"""Processor: images and texts in, a model's inputs out."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit3_fast.data.batch import Batch
from beit3_fast.data.images import MAX_PIXELS, check_max_pixels, preprocess_image
from beit3_fast.data.presets import ImagePreset, image_size_pair
from beit3_fast.data.tokenizer import Padding, Tokenizer, check_lengths
from beit3_fast.errors import ConfigError, InputError

DEFAULT_MAX_LENGTH = 64
# The first two rows of the official text position table are never read.
_RESERVED_POSITIONS = 2
_CLASSIFIER = "BEiT3ForImageClassification"


class Processor:
    """Images and texts to model input, with the preprocessing that the model was trained with.

    ``tokenizer`` is a Tokenizer or what one is made from (a path or bytes), ``preset`` an ImagePreset or the name of
    an official one, ``image_size`` H = W or (H, W) in pixels, ``max_length`` the most tokens of a text, bos and eos
    included (None: any). ``padding`` is True (to the longest text of a batch), "max_length" or False; ``max_pixels``
    is the largest image that is decoded. It may be shared by threads and pickled into worker processes. Raises
    ConfigError for options that make no sense and InputError for a damaged tokenizer file.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str | PathLike[str] | bytes | None = None,
        preset: str | ImagePreset = "square",
        image_size: int | tuple[int, int] = 224,
        max_length: int | None = DEFAULT_MAX_LENGTH,
        *,
        padding: Padding = True,
        max_pixels: int | None = MAX_PIXELS,
    ) -> None:
        self.preset = ImagePreset.get(preset)
        self.image_size = image_size_pair(image_size)
        check_lengths(max_length, padding)
        self.max_length = max_length
        self.padding = padding
        check_max_pixels(max_pixels)
        self.max_pixels = max_pixels
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            tokenizer = Tokenizer(tokenizer)
        self.tokenizer = tokenizer

    @classmethod
    def for_model(
        cls,
        model: Any,
        sentencepiece_model: Tokenizer | str | PathLike[str] | bytes | None = None,
        **options: Any,
    ) -> Processor:
        """The processor that fits a model of this package.

        The image size is the model's. The preset is ``model.preset`` where the checkpoint brought one, else
        "imagenet" for image classification and "square" for everything else. ``options`` override what the constructor
        takes. Raises ConfigError when the model has no configuration, the tokenizer more ids than the model has
        embeddings, or ``max_length`` goes past the model's positions.
        """
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "img_size"):
            raise ConfigError(
                f"expected a beit3_fast model with a config, got {type(model).__name__}"
            )
        preset = getattr(model, "preset", None)
        if preset is None:
            classifies = any(kind.__name__ == _CLASSIFIER for kind in type(model).__mro__)
            preset = "imagenet" if classifies else "square"
        positions = config.max_text_positions - _RESERVED_POSITIONS
        chosen: dict[str, Any] = {
            "preset": preset,
            "image_size": config.img_size,
            "max_length": min(DEFAULT_MAX_LENGTH, positions),
            **options,
        }
        processor = cls(sentencepiece_model, **chosen)
        if processor.max_length is None or processor.max_length > positions:
            raise ConfigError(
                f"max_length must be at most {positions}, the text positions of this model, got {processor.max_length}"
            )
        tokenizer = processor.tokenizer
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {config.vocab_size} embeddings; "
                "use the SentencePiece file that the model was trained with"
            )
        return processor

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None) -> Batch:
        """One image or text, or a list of them, or both, as a Batch.

        Images are what ``load_image`` takes; an array [B, H, W, C] or a tensor [B, C, H, W] is a list of B. Keys:
        ``image`` float32 [B, 3, H, W]; ``text_tokens`` int64 [B, N]; ``text_padding_mask`` bool [B, N], True at
        padding; ``attention_mask`` int64 [B, N], 1 at tokens. There may be more texts than images or fewer (retrieval
        encodes them apart); a model that pairs them asks for equal counts. Raises InputError naming the image or
        text that cannot be used, and ConfigError for text without a tokenizer.
        """
        if images is None and text is None:
            raise InputError("expected images, text or both, got neither")
        batch = Batch()
        if images is not None:
            batch["image"] = self._images(images)
        if text is not None:
            if self.tokenizer is None:
                raise ConfigError(
                    "this processor has no tokenizer, so it takes images only; give it the SentencePiece file, "
                    "Processor(tokenizer='beit3.spm') or Processor.for_model(model, 'beit3.spm')"
                )
            batch.update(self.tokenizer(text, self.max_length, self.padding))
        return batch

    def _images(self, images: Any) -> Tensor:
        if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
            images = list(images)
        many = isinstance(images, (list, tuple))
        sources = images if many else [images]
        if not sources:
            raise InputError("expected at least one image, got none")
        out = torch.empty(len(sources), 3, *self.image_size)
        for index, source in enumerate(sources):
            try:
                out[index] = preprocess_image(
                    source, self.image_size, self.preset, max_pixels=self.max_pixels
                )
            except InputError as error:
                raise InputError(f"image {index}: {error}" if many else str(error)) from error
        return out

    def __repr__(self) -> str:
        return (
            f"Processor(tokenizer={self.tokenizer!r}, preset={self.preset.name!r}, image_size={self.image_size}, "
            f"max_length={self.max_length})"
        )
