"""The folder of a world, which has its name when it is whole, and what a world may be asked for."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from beit3_fast.errors import ConfigError

LEAST_PIXELS = 24

_MARK = "world.json"
_UNFINISHED = ".beit3-fast-partial"


def check_pixels(pixels: Any) -> None:
    """Raises ConfigError for a side of pictures that shows nothing."""
    if type(pixels) is not int or pixels < LEAST_PIXELS:
        raise ConfigError(f"pixels must be an integer of at least {LEAST_PIXELS}, got {pixels!r}")


def is_finished(root: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the world is there already. Raises ConfigError where ``root`` holds another one, or anything else."""
    mark = root / _MARK
    try:
        own = json.loads(mark.read_text())
    except (FileNotFoundError, NotADirectoryError):
        _check_room(root)
        return False
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{mark} cannot be read ({error}), so it is not known what {root} holds; delete the folder, or give another"
        ) from error
    if own != settings:
        raise ConfigError(f"{root} holds another world, {json.dumps(own)}; give another folder")
    return True


@contextlib.contextmanager
def appearing(root: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to draw in; at the end of the block it gets the name ``root``, where nothing or an empty folder is.

    When the block raises or the process dies, ``root`` is what it was, and what was drawn is swept by the next call.
    Raises ConfigError where ``root`` cannot be written, or another process draws it.
    """
    target = Path(os.path.realpath(root))
    partial = target.with_name(f".{target.name}{_UNFINISHED}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            try:
                _clear(partial)
                yield partial
                (partial / _MARK).write_text(json.dumps(settings) + "\n")
                if target.exists():
                    partial.chmod(stat.S_IMODE(target.stat().st_mode))
                os.rename(partial, target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise ConfigError(
            f"{root} cannot be written ({error.strerror or error}) and is what it was before; make room, or give a folder "
            "that you own"
        ) from error


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line of JSON for each row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _check_room(root: Path) -> None:
    if not root.exists():
        return
    if not root.is_dir():
        raise ConfigError(f"{root} is a file; give a folder that is new or empty")
    found = sorted(path.name for path in root.iterdir())
    if found:
        raise ConfigError(
            f"{root} holds no finished world, but {', '.join(found[:3])}{' ...' if found[3:] else ''}; give a folder that is "
            "new or empty"
        )
    if root.samefile(os.curdir):
        # It takes the empty folder's place, whose name the caller's shell would lose.
        raise ConfigError(f"{root} is where you are; give a folder in it")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # The folder itself is locked: a file beside the pictures (checkpoint.lock) would become a part of the world.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process draws into {folder}; wait for it, or give another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
