"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from beit3_fast.errors import CheckpointError

_LOCK = ".lock"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of it. Raises CheckpointError."""
    make_folder(folder)
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
