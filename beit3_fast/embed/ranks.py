"""The processes that torchrun started, which share the shards of one job through torchrun's store."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed

from beit3_fast.embed.work import Bar, EmbedReport, Engine, Work
from beit3_fast.errors import ConfigError

# Ranks wait for each other as long as a shard takes. Where one fails, torchrun ends the others.
_PATIENCE = timedelta(days=30)
_calls = itertools.count()


class Ranks:
    """Rank 0 keeps the manifest; every rank takes the next shard when it comes to it.

    The store holds a counter of the shards taken, and what is done as numbered messages for rank 0, which reads them
    after each of its batches: what a stop costs is the shards that were being made.
    """

    def __init__(self) -> None:
        store, self.rank, self.size = next(torch.distributed.rendezvous("env://"))
        store.set_timeout(_PATIENCE)
        # calls follow each other in the same order on every rank
        self.store = torch.distributed.PrefixStore(f"beit3_fast/embed/{next(_calls)}", store)
        self._read = 0

    def run(
        self, work: Work, job: dict[str, Any], lead: Callable[[Engine], EmbedReport]
    ) -> EmbedReport:
        """The whole job, the report of which every rank gets; ``lead`` is rank 0's part.

        Raises ConfigError on a rank where ``job``, which the manifest has, is not that of rank 0.
        """
        if self.rank:
            self._check(job)
            return self._follow(work)
        self.store.set("job", json.dumps(job))
        report = lead(self._lead)
        told = asdict(report) | {"shards": [str(path) for path in report.shards]}
        self.store.set("report", json.dumps(told))
        # this process may be the one that holds the store
        self.store.wait([f"left {rank}" for rank in range(1, self.size)])
        return report

    def _lead(
        self,
        work: Work,
        todo: Sequence[int],
        bar: Bar,
        record: Callable[[int, dict[str, Any]], None],
    ) -> None:
        def listen() -> None:
            for index in range(self._read, self.store.add("done", 0)):
                number, shard = json.loads(self.store.get(f"done {index}"))
                record(number, shard)
                self._read = index + 1

        self.store.set("todo", json.dumps([list(todo), list(work.again.items())]))
        own = 0
        for number, shard in work.shards(self._claims(todo), _SharedBar(self.store, bar, listen)):
            record(number, shard)
            own += 1
        while own + self._read < len(todo):
            self.store.wait([f"done {self._read}"])
            listen()

    def _check(self, job: dict[str, Any]) -> None:
        led = json.loads(self.store.get("job"))
        other = [key for key in job if led[key] != job[key]]
        if other:
            raise ConfigError(
                f"rank {self.rank} was started with another {', '.join(other)} than rank 0; give every rank the same model and "
                "sources"
            )

    def _follow(self, work: Work) -> EmbedReport:
        todo, again = json.loads(self.store.get("todo"))
        work = replace(work, again=dict(again))
        for done in work.shards(self._claims(todo), _SharedBar(self.store)):
            index = self.store.add("done", 1) - 1
            self.store.set(f"done {index}", json.dumps(done))
        told = json.loads(self.store.get("report"))
        self.store.set(f"left {self.rank}", "")
        return EmbedReport(**told | {"shards": tuple(map(Path, told["shards"]))})

    def _claims(self, todo: Sequence[int]) -> Iterator[int]:
        while (index := self.store.add("taken", 1) - 1) < len(todo):
            yield todo[index]


class _SharedBar:
    """Counts for all ranks; on rank 0 it shows the sum, and listens to the others."""

    def __init__(
        self, store: Any, shown: Bar | None = None, listen: Callable[[], None] = lambda: None
    ) -> None:
        self._store, self._shown, self._listen = store, shown, listen
        self._done = self._skipped = 0

    def add(self, done: int, skipped: int = 0) -> None:
        """``done`` more items, ``skipped`` of them in vain."""
        done, skipped = self._store.add("items", done), self._store.add("skipped", skipped)
        if self._shown is not None:
            self._shown.add(done - self._done, skipped - self._skipped)
        self._done, self._skipped = done, skipped
        self._listen()

    def clear_line(self) -> None:
        """Make room for a message."""
        if self._shown is not None:
            self._shown.clear_line()
