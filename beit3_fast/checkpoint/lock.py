"""One writer at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from beit3_fast.errors import CheckpointError

_LOCK = ".lock"
# The file's lock belongs to a process, which loses it when any of its threads closes the file. A fork has its own.
_own: dict[tuple[int, int, int], object] = {}


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes, and other threads of this one, out of it. Raises CheckpointError."""
    make_folder(folder)
    with _held_here(folder), _held_by_process(folder):
        yield


@contextlib.contextmanager
def _held_here(folder: Path) -> Iterator[None]:
    found = folder.stat()
    key, holder = (os.getpid(), found.st_dev, found.st_ino), object()
    # one step, unlike looking and then setting
    if _own.setdefault(key, holder) is not holder:
        raise CheckpointError(
            f"another thread of this process writes to {str(folder)!r}; wait for it or give another folder"
        )
    try:
        yield
    finally:
        del _own[key]


@contextlib.contextmanager
def _held_by_process(folder: Path) -> Iterator[None]:
    try:
        file = (folder / _LOCK).open("a")
    except OSError as error:
        raise CheckpointError(f"the folder {str(folder)!r} cannot be written ({error})") from error
    with file:
        try:
            # not flock: decoding workers would inherit that, and hold it a while after their parent was killed
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"another process writes to {str(folder)!r} ({error}); wait for it or give another folder"
            ) from error
        yield


def make_folder(folder: Path) -> None:
    """Make the folder and those above it, where they are not there. Raises CheckpointError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the folder {str(folder)!r} cannot be made ({error}); give the path of a folder, there or not"
        ) from error
