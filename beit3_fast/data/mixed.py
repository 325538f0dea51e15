"""MixedData: the micro-batches of a pretraining run, each a function of its number alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor

from beit3_fast.data.augment import Augment
from beit3_fast.data.codes_of_files import CodesOfFiles
from beit3_fast.data.digest import digest_of
from beit3_fast.data.index_files import KINDS, IndexRow, names_of_images, read_index
from beit3_fast.data.masked_batch import MaskedBatch, MaskedSample, masked_batch
from beit3_fast.data.masking import (
    Masking,
    mask_patches,
    mask_words,
    sample_generator,
    sample_order,
)
from beit3_fast.data.processor import Processor
from beit3_fast.data.tokenizer import segments
from beit3_fast.data.views import Views
from beit3_fast.errors import ConfigError, InputError

_ORDER, _MASK, _VIEW = range(3)


@dataclass(frozen=True)
class Mix:
    """Samples of each kind in a micro-batch; the paper has equally many. Raises ConfigError unless there is one at all."""

    image: int = 0
    text: int = 0
    pair: int = 0

    def __post_init__(self) -> None:
        counts = [getattr(self, kind) for kind in KINDS]
        if any(type(count) is not int or count < 0 for count in counts) or not any(counts):
            raise ConfigError(
                f"image, text and pair must be integers of at least 0, one of them above it, got {counts}"
            )


class MixedData:
    """``data[n]`` is micro-batch n of a run without end: a MaskedBatch.

    Every kind goes through its own samples in its own order, anew shuffled each time around, and a sample's mask is drawn from its
    place in that order: neither depends on how many processes prepare batches or where a run was continued.

    ``sources``: official index files (or lists of them) by kind, "image", "text" and "pair", for each kind in ``mix``;
    ``processor`` has a tokenizer where there are texts; ``visual_tokens``: images [B, 3, H, W] -> codes int64 [B, patches], or a
    ``CodesOfFiles``, which is asked for each file and cannot go with ``augment``;
    ``patch_size`` is the model's; ``augment`` changes images, none by default; so many of them as ``keep`` says stay in
    memory. Raises ConfigError and InputError for what does not fit or cannot be read.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        mix: Mix,
        processor: Processor,
        visual_tokens: Callable[[Tensor], Tensor] | CodesOfFiles | None,
        patch_size: int,
        masking: Masking | None = None,
        seed: int = 0,
        augment: Augment | None = None,
        keep: int = 0,
    ) -> None:
        self.mix = mix
        self.views = Views(processor, augment, keep)
        self.masking = masking or Masking()
        self.seed = seed
        self.processor = processor
        self.visual_tokens = visual_tokens
        # To ask for a protocol takes as long as to draw a mask.
        self._codes_of = visual_tokens.of_file if isinstance(visual_tokens, CodesOfFiles) else None
        height, width = processor.image_size
        self.grid = height // patch_size, width // patch_size
        self.rows: dict[str, list[IndexRow]] = {}
        for kind in KINDS:
            if not getattr(mix, kind):
                continue
            given = sources.get(kind, [])
            paths = [given] if isinstance(given, (str, PathLike)) else given
            self.rows[kind] = [row for path in paths for row in read_index(path, kind)]
            if not self.rows[kind]:
                raise InputError(f"mix has samples of kind {kind!r}, but sources has none")
        if (mix.text or mix.pair) and processor.tokenizer is None:
            raise ConfigError("texts need a processor with a tokenizer, whose <mask> is used")
        if (mix.image or mix.pair) and visual_tokens is None:
            raise ConfigError("images need visual_tokens, such as a PatchCodes")
        if self._codes_of is not None and self.views.changes:
            raise ConfigError(
                "codes of files are not those of changed images; leave augment out, or have a tokenizer make the codes"
            )

    def __getitem__(self, number: int) -> MaskedBatch:
        samples = []
        for kind, rows in self.rows.items():
            count = getattr(self.mix, kind)
            for place in range(number * count, (number + 1) * count):
                epoch, within = divmod(place, len(rows))
                index = int(
                    sample_order(len(rows), self.seed, _ORDER, KINDS.index(kind), epoch)[within]
                )
                samples.append(self._sample(kind, rows[index], epoch, index))
        return masked_batch(self._with_codes(samples))

    @property
    def identity(self) -> str:
        """A digest of what the batches are made of, so that a run is not continued with other data; pixels are not read."""
        processor = self.processor
        tokenizer = processor.tokenizer
        vocabulary = "" if tokenizer is None else tokenizer.identity
        made_of = [
            str(getattr(self.visual_tokens, "identity", "")),
            *(
                repr(own)
                for own in (
                    self.mix,
                    self.masking,
                    self.views.augment,
                    self.seed,
                    self.grid,
                    vocabulary,
                )
            ),
            repr((processor.image_size, processor.max_length, processor.preset)),
            *(
                repr((kind, [row.text for row in rows], len(rows)))
                for kind, rows in self.rows.items()
            ),
            *(
                repr(names_of_images([row.image for row in rows if row.image is not None]))
                for rows in self.rows.values()
            ),
        ]
        return digest_of("\n".join(made_of))

    def _sample(self, kind: str, row: IndexRow, epoch: int, index: int) -> MaskedSample:
        place = KINDS.index(kind), epoch, index
        luck = sample_generator(self.seed, _MASK, *place)
        patches, words = self.masking.shares(kind, luck)
        fields: dict[str, Tensor] = {}
        if row.image is not None:
            luck_of_view = partial(sample_generator, self.seed, _VIEW, *place)
            fields["image"] = self.views(row.image, luck_of_view)
            if self._codes_of is not None:
                fields["codes"] = self._codes_of(row.image)
            fields["hidden_patches"] = mask_patches(
                self.grid, patches, luck, self.masking.min_block, self.masking.max_aspect
            )
        if row.text is not None:
            tokenizer: Any = self.processor.tokenizer
            ids = tokenizer.encode(row.text) if isinstance(row.text, str) else row.text
            text = segments([ids], self.processor.max_length, padding=False)["text_tokens"][0]
            masked = mask_words(
                text,
                words,
                luck,
                tokenizer.mask_id,
                self.masking.random_words,
                self.masking.kept_words,
            )
            fields |= {"text": masked.tokens, "hidden_words": masked.hidden, "words": text}
        return MaskedSample(**fields)

    def _with_codes(self, samples: Sequence[MaskedSample]) -> list[MaskedSample]:
        images = [sample.image for sample in samples if sample.image is not None]
        if not images or self._codes_of is not None:
            return list(samples)
        encode = cast(Callable[[Tensor], Tensor], self.visual_tokens)
        codes = iter(encode(torch.stack(images)))
        return [s if s.image is None else s._replace(codes=next(codes)) for s in samples]
