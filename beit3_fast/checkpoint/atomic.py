"""A file that appears under its name whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from io import BufferedRandom
from pathlib import Path

from beit3_fast.errors import CheckpointError

_SUFFIX = ".beit3-fast-partial"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BufferedRandom]:
    """A new file, open for writing; at the end of the block it is on the disk and has taken the place of ``path``.

    When the block raises, or the process dies, ``path`` is what it was. A symbolic link keeps pointing where it did,
    permissions are kept. What killed processes left behind for this path is swept. Raises CheckpointError when the
    file cannot be written.
    """
    try:
        target = Path(os.path.realpath(path))
        mode = _check_target(target)
        _sweep(target)
        with _create(target) as file:
            partial = Path(file.name)
            try:
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, target)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot be written: {error.strerror or error}{mend(error)}; "
            "what was there before is unchanged"
        ) from error


def _check_target(target: Path) -> int | None:
    """Permission bits of the file to be replaced, None when there is none."""
    if not target.parent.is_dir():
        raise CheckpointError(f"the folder {target.parent} does not exist; make it first")
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            "it is no regular file and cannot be replaced; give the name of a file"
        )
    return stat.S_IMODE(mode)


def _prefix(target: Path) -> str:
    return f".{target.name[:100]}."


def _create(target: Path) -> BufferedRandom:
    """A new file beside ``target``. Its lock tells a sweeping process that its writer is alive."""
    while True:
        partial = target.parent / f"{_prefix(target)}{secrets.token_hex(6)}{_SUFFIX}"
        file = partial.open("x+b")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if partial.exists():
            return file
        file.close()


def _sweep(target: Path) -> None:
    """Remove the unfinished files of processes that died. One that still has its lock has a living writer."""
    for name in os.listdir(target.parent):
        if not (name.startswith(_prefix(target)) and name.endswith(_SUFFIX)):
            continue
        with contextlib.suppress(OSError), (target.parent / name).open("rb") as orphan:
            fcntl.flock(orphan, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(orphan.name)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    # without this a power cut may bring the old name back; some file systems cannot do it
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def mend(error: OSError) -> str:
    """How to go on after an error of the operating system, in brackets, or nothing."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return " (make room, or write to another disk)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return " (write to a folder that you own)"
    return ""
