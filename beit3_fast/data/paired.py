"""PairedData: the micro-batches of a fine-tuning run, image, text and what should come out, each a function of its number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from beit3_fast.data.augment import Augment
from beit3_fast.data.digest import digest_of
from beit3_fast.data.index_files import images_and_text, names_of_images, read_entries
from beit3_fast.data.masking import sample_generator, sample_order
from beit3_fast.data.pair_batch import PairBatch
from beit3_fast.data.processor import Processor
from beit3_fast.data.tokenizer import Tokenizer, segments
from beit3_fast.data.views import Views
from beit3_fast.errors import ConfigError, InputError

B = TypeVar("B", bound=PairBatch)

_ORDER, _VIEW = range(2)


class PairedRow(NamedTuple):
    """A line of an index file: path of the image, text (token ids without bos and eos, or a sentence), and what the task
    reads beside them."""

    image: str
    text: str | tuple[int, ...]
    target: Any


def read_paired(
    path: str | PathLike[str], target: Callable[[dict[str, Any]], Any]
) -> list[PairedRow]:
    """The lines of an official index file with ``target`` of each; image paths count from its own folder.

    Raises InputError, naming file and line, for what cannot be used; ``target`` may raise it, too.
    """
    folder = Path(path).parent

    def row(entry: Any) -> PairedRow:
        (image,), text = images_and_text(entry, "pair")
        assert text is not None
        return PairedRow(str(folder / image), text, target(entry))

    return read_entries(path, row)


class PairedData(Generic[B]):
    """``data[n]`` is micro-batch n of a run without end: ``collate`` of a PairBatch and its rows' targets.

    Every row comes once an epoch, in an order shuffled anew each time. ``processor`` has a tokenizer where texts are
    sentences; ``augment`` changes images, none by default; so many of them as ``keep`` says stay in memory. Raises
    ConfigError and InputError for what does not fit.
    """

    def __init__(
        self,
        rows: Sequence[PairedRow],
        batch_size: int,
        processor: Processor,
        collate: Callable[[PairBatch, Sequence[Any]], B],
        seed: int = 0,
        augment: Augment | None = None,
        keep: int = 0,
    ) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise ConfigError(f"batch_size must be a positive integer, got {batch_size!r}")
        if not rows:
            raise InputError("expected at least one line in the index files, got none")
        self.rows = rows
        self.batch_size = batch_size
        self.processor = processor
        self.collate = collate
        self.seed = seed
        self.views = Views(processor, augment, keep)

    def __getitem__(self, number: int) -> B:
        rows, views = [], []
        for place in range(number * self.batch_size, (number + 1) * self.batch_size):
            epoch, within = divmod(place, len(self.rows))
            index = int(sample_order(len(self.rows), self.seed, _ORDER, epoch)[within])
            rows.append(self.rows[index])
            views.append((epoch, index))
        return self._batch(rows, views)

    def in_order(self) -> Iterator[B]:
        """Every row once, as it is in the files, without augmentation; the last batch may be smaller."""
        for start in range(0, len(self.rows), self.batch_size):
            yield self._batch(self.rows[start : start + self.batch_size], None)

    @property
    def identity(self) -> str:
        """A digest of what the batches are made of, so that a run is not continued with other data; pixels are not read."""
        processor = self.processor
        tokenizer = processor.tokenizer
        made_of = (
            [(row.text, row.target) for row in self.rows],
            names_of_images([row.image for row in self.rows]),
            "" if tokenizer is None else tokenizer.identity,
            self.batch_size,
            self.seed,
            self.views.augment,
            (processor.image_size, processor.max_length, processor.preset),
        )
        return digest_of(repr(made_of))

    def _batch(self, rows: Sequence[PairedRow], views: Sequence[tuple[int, int]] | None) -> B:
        processor = self.processor
        images = []
        for number, row in enumerate(rows):
            luck = None
            if views is not None:
                luck = partial(sample_generator, self.seed, _VIEW, *views[number])
            images.append(self.views(row.image, luck))
        ids = [token_ids(row.text, processor.tokenizer) for row in rows]
        text = segments(ids, processor.max_length)
        batch = PairBatch(torch.stack(images), text["text_tokens"], text["text_padding_mask"])
        return self.collate(batch, [row.target for row in rows])


def token_ids(text: str | Sequence[int], tokenizer: Tokenizer | None) -> Sequence[int]:
    """The ids of a text of an index file. Raises ConfigError for a sentence without a tokenizer."""
    if not isinstance(text, str):
        return text
    if tokenizer is None:
        raise ConfigError("the index file has sentences, not ids; name the SentencePiece file")
    return tokenizer.encode(text)
