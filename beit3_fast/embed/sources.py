"""What there is to embed: images and texts of folders, tar shards and index files, as one list in a fixed order."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from beit3_fast.data.image_files import state_of_file
from beit3_fast.data.images import IMAGE_SUFFIXES
from beit3_fast.data.index_files import KINDS, images_and_text
from beit3_fast.errors import ConfigError, InputError

_TEXT_SUFFIX = ".txt"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BLOCK = 512


class Blob(NamedTuple):
    """Bytes of a file: ``size`` of them from ``offset``, or all where ``offset`` is None; ``changed``: when the file was,
    in ns. Size and time are -1 where there is no such file."""

    path: str
    offset: int | None = None
    size: int = 0
    changed: int = 0


class Item(NamedTuple):
    """One row to come. ``text`` is a file, a sentence or token ids without bos and eos; ``problem`` says why there is none."""

    name: str
    image: Blob | None = None
    text: Blob | str | tuple[int, ...] | None = None
    problem: str | None = None


class _File(NamedTuple):
    """A file of a folder or tar: files with one key belong together."""

    name: str
    key: str
    suffix: str
    blob: Blob


def list_items(sources: Any, kind: str) -> list[Item]:
    """Every item of one source or several, in their order; within a folder by name, elsewhere as in the file.

    A source is a folder (searched with all below it), an image or text file, a ``.tar`` in webdataset's layout or a
    ``.jsonl`` index in the official form, whose image paths count from its own folder. What is damaged inside a source
    becomes an item with a problem. Raises ConfigError for an unknown kind, InputError for a source that is not there,
    is of no such form or has nothing of this kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    given = [sources] if isinstance(sources, (str, PathLike)) else sources
    if (
        not isinstance(given, (list, tuple))
        or not given
        or not all(isinstance(source, (str, PathLike)) and os.fspath(source) for source in given)
    ):
        raise InputError(
            f"sources must be a path or a list of at least one: folders, .tar, .jsonl or files, got {sources!r:.80}"
        )
    items: list[Item] = []
    for source in given:
        found = list(_items_of(Path(os.fsdecode(source)), kind))
        if not found:
            raise InputError(
                f"{os.fsdecode(source)!r} has nothing of kind {kind!r}: images end in {', '.join(IMAGE_SUFFIXES)}, texts "
                f"in {_TEXT_SUFFIX}, a pair is both under one name"
            )
        items += found
    return items


def digest_of(items: Sequence[Item]) -> str:
    """What two lists share only if they are the same: names, places, sizes and when files were changed; pixels are not read."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(tuple(item)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _items_of(source: Path, kind: str) -> Iterator[Item]:
    suffix = source.suffix.lower()
    if source.is_dir():
        yield from _folder(source, kind)
    elif not source.is_file():
        raise InputError(f"there is no file or folder {str(source)!r}")
    elif source.name.lower().endswith(_COMPRESSED):
        raise InputError(f"{str(source)!r} is compressed; unpack it to a plain .tar first")
    elif suffix == ".tar":
        yield from _tar(source, kind)
    elif suffix == ".jsonl":
        yield from _index(source, kind)
    elif kind == "image":
        yield Item(str(source), image=_whole(source))
    elif kind == "text":
        yield Item(str(source), text=_whole(source))
    else:
        text = source.with_suffix(_TEXT_SUFFIX)
        yield from _of_files(
            [*_on_disk([source]), *_on_disk([text] if text.is_file() else [])], kind
        )


def _folder(folder: Path, kind: str) -> Iterator[Item]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    yield from _of_files(_on_disk(paths), kind)
    for path in paths:
        if path.suffix.lower() == ".tar":
            yield from _tar(path, kind)


def _whole(path: Path) -> Blob:
    size, changed = state_of_file(str(path))
    return Blob(str(path), None, size, changed)


def _on_disk(paths: Sequence[Path]) -> list[_File]:
    return [
        _File(
            str(path),
            str(path.with_suffix("")),
            path.suffix.lower(),
            _whole(path),
        )
        for path in sorted(paths)
        if path.suffix.lower() in (*IMAGE_SUFFIXES, _TEXT_SUFFIX)
    ]


def _of_files(files: Sequence[_File], kind: str) -> Iterator[Item]:
    texts = {file.key: file.blob for file in files if file.suffix == _TEXT_SUFFIX}
    for file in files:
        if file.suffix == _TEXT_SUFFIX:
            if kind == "text":
                yield Item(file.name, text=file.blob)
        elif kind == "image":
            yield Item(file.name, image=file.blob)
        elif kind == "pair":
            text = texts.get(file.key)
            problem = None if text else f"there is no {_TEXT_SUFFIX} file with its name"
            yield Item(file.name, file.blob, text, problem)


def _tar(path: Path, kind: str) -> Iterator[Item]:
    files, problem = _members(path)
    yield from _of_files(files, kind)
    if problem is not None:
        yield Item(str(path), problem=problem)


def _members(path: Path) -> tuple[list[_File], str | None]:
    """The images and texts of a tar, and what is wrong with the rest of it."""
    files: list[_File] = []
    changed = state_of_file(str(path))[1]
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                suffix = f".{extension.rpartition('.')[2].lower()}"
                if not member.isreg() or member.issparse() or not key:
                    continue
                if suffix in (*IMAGE_SUFFIXES, _TEXT_SUFFIX):
                    blob = Blob(str(path), member.offset_data, member.size, changed)
                    files.append(_File(f"{path}/{member.name}", f"{folder}/{key}", suffix, blob))
            # tarfile takes damage behind the first header for the end
            raw.seek(tar.offset)
            if any(raw.read(_BLOCK)):
                return files, f"it is damaged at byte {tar.offset}; what follows is lost"
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        return files, f"it is damaged or no plain tar ({error})"
    return files, None


def _index(path: Path, kind: str) -> Iterator[Item]:
    seen: set[Path] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            name = f"{path}#{number}"
            try:
                entry = json.loads(line)
                images, text = images_and_text(entry, kind)
            except (InputError, ValueError, RecursionError) as error:
                yield Item(name, problem=f"the line cannot be used ({error})")
                continue
            paths = [path.parent / image for image in images]
            if kind == "image":
                # retrieval and captioning name an image once for each of its captions
                for image in paths:
                    if image not in seen:
                        seen.add(image)
                        yield Item(str(image), image=_whole(image))
            else:
                yield Item(name, _whole(paths[0]) if paths else None, text)
