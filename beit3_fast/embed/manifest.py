"""manifest.json: what a folder of embeddings is made of, and how much of it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from beit3_fast import unreadable
from beit3_fast.checkpoint.atomic import replacing
from beit3_fast.errors import CheckpointError, ConfigError

NAME = "manifest.json"
_FORMAT = "beit3_fast embeddings 3"
_COUNTS = ("bytes", "rows", "skipped", "unread")


class Manifest:
    """The job that a folder belongs to and its finished shards, by number; on disk after every ``add``.

    Raises ConfigError where the folder holds a job that is not this one, CheckpointError for a damaged manifest.
    """

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        self.path = folder / NAME
        self.job = job
        self.shards: dict[int, dict[str, Any]] = {}
        if self.path.exists():
            self._continue()

    def is_done(self, number: int) -> bool:
        """Whether the shard was finished, is still there, and lacks nothing that may be read another time."""
        shard = self.shards.get(number)
        return shard is not None and not shard["unread"] and is_whole(self.path.parent, shard)

    def rows_of(self, number: int) -> int:
        """How many rows a shard has that was finished and is still there."""
        shard = self.shards.get(number)
        if shard is None or not is_whole(self.path.parent, shard):
            return 0
        rows: int = shard["rows"]
        return rows

    def add(self, number: int, shard: dict[str, Any]) -> None:
        """Record a shard whose files are on the disk."""
        self.shards[number] = shard
        content = {
            "format": _FORMAT,
            "job": self.job,
            "shards": {str(key): self.shards[key] for key in sorted(self.shards)},
        }
        write(self.path, json.dumps(content, indent=1, ensure_ascii=True) + "\n")

    def _continue(self) -> None:
        try:
            job, shards = read(self.path.parent)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; give another folder") from error
        other = [key for key in self.job if job.get(key) != self.job[key]]
        if other:
            why = (
                ", of which a file was added, removed, written again or is named by another path"
                if "sources" in other
                else ""
            )
            raise ConfigError(
                f"{self.path.parent} holds another job, of another {', '.join(other)}{why}; give another folder, or the same "
                "arguments to go on with that one"
            )
        self.shards = shards


def read(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The job and the finished shards of a folder. Raises CheckpointError."""
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {_FORMAT!r}")
        job = dict(content["job"])
        shards = {int(number): dict(shard) for number, shard in content["shards"].items()}
        if not all(
            isinstance(shard["file"], str)
            and "/" not in shard["file"]
            and all(type(shard[key]) is int for key in _COUNTS)
            for shard in shards.values()
        ):
            raise ValueError("its shards are not described as expected")
        if not all(type(job[key]) is int and job[key] > 0 for key in ("items", "shard_size")):
            raise ValueError("its job is not described as expected")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be used ({unreadable.why(error)})") from error
    return job, shards


def is_whole(folder: Path, shard: dict[str, Any]) -> bool:
    """Whether the file of a finished shard is there, in its length."""
    path = folder / shard["file"]
    return path.is_file() and path.stat().st_size == shard["bytes"]


def number_of_shards(items: int, shard_size: int) -> int:
    """How many files hold so many items."""
    return -(-items // shard_size)


def write(path: Path, text: str) -> None:
    """A text file, whole or not at all. Raises CheckpointError."""
    try:
        with replacing(path) as file:
            file.write(text.encode("utf-8", "surrogatepass"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
