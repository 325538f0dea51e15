"""What a worker process does: items of a list to model input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from beit3_fast import unreadable
from beit3_fast.data import Processor, segments
from beit3_fast.data.index_files import has_words
from beit3_fast.data.tokenizer import is_cut
from beit3_fast.embed.sources import Blob, Item
from beit3_fast.errors import InputError

_MAX_TEXT_BYTES = 1 << 20


class Skipped(NamedTuple):
    """An item that cannot be used. ``may_pass``: the system failed and not the item."""

    place: int
    reason: str
    may_pass: bool = False


class Chunk(NamedTuple):
    """Decoded items by their places in the list: images float32 [n, 3, H, W], token ids with bos and eos.

    ``cut``: places of those whose text is longer. ``unshared`` says why a worker cannot hand over the images, which are then missing.
    """

    places: list[int]
    images: Tensor | None
    texts: list[list[int]]
    skipped: list[Skipped]
    cut: list[int]
    unshared: str | None = None


class Decoder(Dataset[Chunk]):
    """Items, to be decoded by the chunk; one that cannot be used is in ``skipped`` with the reason."""

    def __init__(self, items: Sequence[Item], processor: Processor, vocab_size: int) -> None:
        self.items = items
        self.processor = processor
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, places: list[int]) -> Chunk:
        """The items at ``places``; the name is DataLoader's for fetching many at once."""
        done: list[int] = []
        images: list[Tensor] = []
        texts: list[list[int]] = []
        skipped: list[Skipped] = []
        cut: list[int] = []
        for place in places:
            item = self.items[place]
            try:
                if item.problem is not None:
                    raise InputError(item.problem)
                text, shortened = (None, False) if item.text is None else self._text(item.text)
                image = None if item.image is None else self._image(item.image)
            # OSError: a disk that fails on one file does not end the job
            except (InputError, OSError) as error:
                reason = str(error) if isinstance(error, InputError) else unreadable.why(error)
                skipped.append(Skipped(place, reason, unreadable.may_pass(error)))
                continue
            done.append(place)
            cut += [place] if shortened else []
            if text is not None:
                texts.append(text)
            if image is not None:
                images.append(image)
        chunk = Chunk(done, torch.stack(images) if images else None, texts, skipped, cut)
        return chunk if get_worker_info() is None else _shared(chunk)

    def _image(self, blob: Blob) -> Tensor:
        image: Tensor = self.processor(images=blob.path if blob.offset is None else _read(blob))[
            "image"
        ][0]
        return image

    def _text(self, text: Blob | str | tuple[int, ...]) -> tuple[list[int], bool]:
        """Token ids, and whether they are not all of the text."""
        length = self.processor.max_length
        if isinstance(text, Blob):
            if text.size > _MAX_TEXT_BYTES:
                raise InputError(
                    f"a text has at most {_MAX_TEXT_BYTES} bytes, this one has {text.size}"
                )
            try:
                text = _read(text).decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise InputError(f"the text is not UTF-8 ({error})") from error
        if not has_words(text):
            raise InputError("the text has no words")
        if isinstance(text, str):
            assert self.processor.tokenizer is not None
            text = tuple(self.processor.tokenizer.encode(text))
        else:
            strange = [token for token in text if not 0 <= token < self.vocab_size]
            if strange:
                raise InputError(f"token ids must be below {self.vocab_size}, got {strange[0]}")
        ids: list[int] = segments([text], length, padding=False)["text_tokens"][0].tolist()
        return ids, is_cut(text, length)


class Claims:
    """The order in which a DataLoader asks for places: lists of items, each cut into chunks of ``size``.

    A list is taken from ``lists`` when decoding comes to it, so that processes may share what gives them.
    """

    def __init__(self, lists: Iterable[list[int]], size: int) -> None:
        self.lists = lists
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        for own in self.lists:
            for start in range(0, len(own), self.size):
                yield own[start : start + self.size]

    def count(self, own: list[int]) -> int:
        """The number of chunks of one list."""
        return -(-len(own) // self.size)


def _shared(chunk: Chunk) -> Chunk:
    """The images in memory that processes share. DataLoader does that too, but where it fails, waits without end."""
    if chunk.images is None:
        return chunk
    size = chunk.images.nbytes
    try:
        chunk.images.share_memory_()
    except (RuntimeError, OSError) as error:
        reason = f"{len(chunk.images)} images of {size / 2**20:.3g} MiB in all ({error})"
        return chunk._replace(images=None, unshared=reason)
    return chunk


def _read(blob: Blob) -> bytes:
    with open(blob.path, "rb") as file:
        if blob.offset is None:
            return file.read(_MAX_TEXT_BYTES)
        file.seek(blob.offset)
        data = file.read(blob.size)
    if len(data) != blob.size:
        raise InputError(f"{blob.path!r} ends too early; it is damaged or was changed")
    return data
