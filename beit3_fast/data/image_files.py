"""Which images there are: files, folders of them, and index files in the official form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from beit3_fast.data.images import IMAGE_SUFFIXES
from beit3_fast.data.index_files import read_index
from beit3_fast.errors import InputError


def list_images(sources: str | PathLike[str] | Sequence[str | PathLike[str]]) -> list[str]:
    """Paths of the images of each source in turn, each path once.

    A source is an image, a folder (with all below it, sorted) or a ``.jsonl`` index, whose paths count from its own folder. Raises
    InputError for a folder without images and an index that cannot be read.
    """
    given = [sources] if isinstance(sources, (str, PathLike)) else sources
    if not isinstance(given, Sequence) or not all(isinstance(s, (str, PathLike)) for s in given):
        raise InputError(f"expected the path of images, or a list of such paths, got {given!r:.80}")
    paths: list[str] = []
    for source in map(Path, given):
        if os.path.isdir(source):
            paths += images_of_folder(source)
        elif source.suffix.lower() == ".jsonl":
            paths += [row.image for row in read_index(source, "image") if row.image is not None]
        else:
            paths.append(str(source))
    return list(dict.fromkeys(paths))


def images_of_folder(folder: str | PathLike[str]) -> list[str]:
    """The image files of a folder and all below it, sorted. Raises InputError where there are none."""
    found = sorted(
        str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
    )
    if not found:
        raise InputError(
            f"the folder {str(folder)!r} has no image files ({', '.join(IMAGE_SUFFIXES)}); name the files"
        )
    return found


def state_of_file(path: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds, -1 for both where there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns
