"""What one process does for a dataset: shards by their numbers, decoded ahead of the model, written where they belong."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from beit3_fast.data import Processor
from beit3_fast.embed.decode import Chunk, Claims, Decoder, Skipped
from beit3_fast.embed.manifest import number_of_shards
from beit3_fast.embed.shards import read_shard, stored_name, write_shard
from beit3_fast.embed.sources import Item
from beit3_fast.errors import CheckpointError, InputError
from beit3_fast.retrieval.origin import origin_of

logger = logging.getLogger("beit3_fast")

_TEXTS_AT_ONCE = 256


class Bar(Protocol):
    """Who is told of progress."""

    def add(self, done: int, skipped: int = 0) -> None:
        """``done`` more items, ``skipped`` of them in vain."""

    def clear_line(self) -> None:
        """Make room for a message."""


@dataclass(frozen=True)
class EmbedReport:
    """What a folder holds when the job is done.

    ``shards`` are its files in order, of which ``EmbeddingIndex.load`` reads those in safetensors; ``embedded`` rows, ``skipped`` items
    that could not be used, ``unread`` those of them that the system did not give, which the same call tries again;
    ``resumed`` items that an earlier call had done.
    """

    shards: tuple[Path, ...]
    embedded: int
    skipped: int
    unread: int
    resumed: int


class _Begun(NamedTuple):
    """A shard when its turn has come: rows [N, C] that an earlier call left, their places, and the places that are left."""

    number: int
    rows: Tensor
    places: list[int]
    left: list[int]


@dataclass
class Work:
    """A job without what is done of it; it can be pickled into other processes. Shard n holds the items from
    n * shard_size on; the process that calls ``shards`` writes their files into ``folder``. ``again``: shards of an earlier
    call that lack items which may be read now, and how many rows they have, which are kept."""

    model: Any
    processor: Processor
    items: Sequence[Item]
    folder: Path
    kind: str
    output: str
    form: str
    width: int
    batch_size: int
    shard_size: int
    workers: int
    again: Mapping[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of shards."""
        return number_of_shards(len(self.items), self.shard_size)

    def places(self, number: int) -> range:
        """The items of a shard."""
        first = number * self.shard_size
        return range(first, min(first + self.shard_size, len(self.items)))

    def left(self, number: int) -> int:
        """How many items of a shard are to be embedded."""
        return len(self.places(number)) - self.again.get(number, 0)

    def shards(self, numbers: Iterable[int], bar: Bar) -> Iterator[tuple[int, dict[str, Any]]]:
        """Make these shards; yields each number, with what the manifest says of it, once its files are on the disk.

        The next number is asked for when decoding comes to it. Raises InputError where shared memory is
        too small, CheckpointError where a file cannot be written.
        """
        size = _TEXTS_AT_ONCE if self.kind == "text" else self.batch_size
        begun: deque[_Begun] = deque()
        claims = Claims(self._noted(numbers, begun), size)
        decoded = self._decoded(claims)
        for first in decoded:
            number, rows, places, left = begun.popleft()
            more = itertools.islice(decoded, claims.count(left) - 1)
            new, own, skipped = self._rows(itertools.chain([first], more), bar)
            places = [*places, *own]
            order = sorted(range(len(places)), key=places.__getitem__)
            rows, places = torch.cat([rows, new])[order], [places[index] for index in order]
            names = [self.items[place].name for place in places]
            reasons = [
                {"name": self.items[own.place].name, "reason": own.reason} for own in skipped
            ]
            origin = origin_of(self.model, f"{self.output} {self.kind}")
            made = write_shard(self.folder, number, self.form, rows, names, reasons, origin)
            yield number, made | {"unread": sum(own.may_pass for own in skipped)}

    def _noted(self, numbers: Iterable[int], begun: deque[_Begun]) -> Iterator[list[int]]:
        """Of each shard the places that are to be embedded, what is known of it noted when they are taken."""
        for number in numbers:
            own = self._begin(number)
            begun.append(own)
            yield own.left

    def _begin(self, number: int) -> _Begun:
        every = list(self.places(number))
        fresh = _Begun(number, torch.empty(0, self.width), [], every)
        if number not in self.again:
            return fresh
        place_of = {stored_name(self.items[place].name, self.form): place for place in every}
        try:
            rows, names = read_shard(self.folder, number, self.form)
        except CheckpointError:
            return fresh
        done = [place_of[name] for name in names if name in place_of]
        left = sorted(set(every) - set(done))
        fits = len(place_of) == len(every) and len(done) == len(names)
        if not (fits and left and rows.shape[1] == self.width):
            return fresh
        return _Begun(number, rows, done, left)

    def _decoded(self, claims: Claims) -> Iterator[Chunk]:
        decoder = Decoder(self.items, self.processor, self.model.backbone.config.vocab_size)
        loader = DataLoader(
            decoder, batch_sampler=claims, num_workers=self.workers, collate_fn=_unchanged
        )
        try:
            for chunk in loader:
                if chunk.unshared is not None:
                    raise InputError(self._no_room(chunk.unshared))
                yield chunk
        # their semaphores lie in shared memory as well
        except OSError as error:
            raise InputError(self._no_room(f"what joins the processes ({error})")) from error

    def _no_room(self, what: str) -> str:
        return (
            f"shared memory has no room for {what}; with workers={self.workers} up to {2 * self.workers + 1} batches of "
            f"{self.batch_size} wait there{_shared_memory()}; take fewer workers (0 needs none), a smaller batch size or a "
            "larger /dev/shm (docker run --shm-size 2g)"
        )

    def _rows(self, chunks: Iterator[Chunk], bar: Bar) -> tuple[Tensor, list[int], list[Skipped]]:
        """Embeddings of the chunks of one shard with their places, and what was skipped, in order."""
        parts: list[Tensor] = []
        places: list[int] = []
        skipped: list[Skipped] = []
        texts: list[tuple[int, int, list[int]]] = []
        cut: list[int] = []

        def skip(own: Skipped) -> None:
            bar.clear_line()
            logger.warning("skipped %s: %s", self.items[own.place].name, own.reason)
            skipped.append(own)

        def embed(own: list[int], images: Tensor | None, tokens: list[list[int]]) -> None:
            words = [torch.tensor(ids) for ids in tokens]
            rows = encode(self.model, self.kind, self.output, images, words)
            good = rows.isfinite().all(1).tolist()
            parts.append(rows[good])
            places.extend(place for place, is_good in zip(own, good, strict=True) if is_good)
            for place, is_good in zip(own, good, strict=True):
                if not is_good:
                    skip(Skipped(place, "its embedding is not finite; try another dtype"))
            bar.add(len(own), good.count(False))

        for chunk in chunks:
            cut += chunk.cut
            for one in chunk.skipped:
                skip(one)
            bar.add(len(chunk.skipped), len(chunk.skipped))
            if self.kind == "text":
                texts += [
                    (len(ids), place, ids)
                    for place, ids in zip(chunk.places, chunk.texts, strict=True)
                ]
            elif chunk.places:
                embed(chunk.places, chunk.images, chunk.texts)
        # texts of one length meet in one batch, where nothing waits for a long one
        texts.sort()
        for start in range(0, len(texts), self.batch_size):
            _, own, tokens = zip(*texts[start : start + self.batch_size], strict=True)
            embed(list(own), None, list(tokens))
        if cut:
            bar.clear_line()
            logger.warning(
                "texts cut behind %d tokens: %d, the first of them that of %s",
                *(self.processor.max_length, len(cut), self.items[cut[0]].name),
            )
        skipped.sort()
        return torch.cat([torch.empty(0, self.width), *parts]), places, skipped


@contextmanager
def telling_of_dead_workers() -> Iterator[None]:
    """Raises InputError where a decoding worker dies: PyTorch raises RuntimeError wherever the main thread is then."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise InputError(
            f"a decoding worker died ({str(error).splitlines()[0]}); the same call again goes on from the last "
            "shard, with fewer workers if memory was short"
        ) from error


Engine = Callable[[Work, Sequence[int], Bar, Callable[[int, dict[str, Any]], None]], None]
"""Makes the shards of these numbers, each once, tells the bar, and has the last argument record every one."""


def make_local(
    work: Work, todo: Sequence[int], bar: Bar, record: Callable[[int, dict[str, Any]], None]
) -> None:
    """The engine of this process alone."""
    for number, shard in work.shards(todo, bar):
        record(number, shard)


def encode(
    model: Any, kind: str, output: str, images: Tensor | None, texts: list[Tensor]
) -> Tensor:
    """Rows, fp32 [B, C] on the CPU."""
    if kind == "image":
        rows = model.encode_image(images, output, batch_size=1 if images is None else len(images))
    elif kind == "text":
        rows = model.encode_text(texts, output, batch_size=len(texts))
    else:
        rows = model.encode_pair(images, texts, output, batch_size=len(texts))
    return rows.to("cpu", torch.float32)


def _shared_memory() -> str:
    try:
        found = shutil.disk_usage("/dev/shm")
    except OSError:
        return ""
    return (
        f", and /dev/shm has {found.total / 2**20:.3g} MiB, {found.free / 2**20:.3g} of them free"
    )


def _unchanged(chunk: Any) -> Any:
    return chunk
