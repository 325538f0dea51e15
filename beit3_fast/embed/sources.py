"""What there is to embed: images and texts of folders, tar shards and index files, as one list in a fixed order."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from beit3_fast import unreadable
from beit3_fast.data.image_files import state_of_file
from beit3_fast.data.images import IMAGE_SUFFIXES
from beit3_fast.data.index_files import KINDS, images_and_text
from beit3_fast.errors import ConfigError, InputError

_TEXT_SUFFIX = ".txt"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_BLOCK = 512
_CHUNK = 1 << 20
_NO_FILE = "it is no regular file, or a link that leads nowhere"

logger = logging.getLogger("beit3_fast")


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
    """A file of a folder or tar: files with one key belong together. ``problem`` says why it cannot be read."""

    name: str
    key: str
    suffix: str
    blob: Blob
    problem: str | None = None


def list_items(sources: Any, kind: str) -> list[Item]:
    """Every item of one source or several, in their order; within a folder by name, elsewhere as in the file.

    A source is a folder (searched with all below it, links followed), an image or text file, a ``.tar`` in webdataset's
    layout or a ``.jsonl`` index in the official form, whose image paths count from its own folder. What cannot be read
    inside a source becomes an item with a problem. A file that is reached again, by whatever path, gives no second item;
    the log says how many were left out. Raises ConfigError for an unknown kind, InputError for a source that is not there,
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
    seen: set[Any] = set()
    for source in given:
        found = list(_items_of(Path(os.fsdecode(source)), kind))
        if not found:
            raise InputError(
                f"{os.fsdecode(source)!r} has nothing of kind {kind!r}: images end in {', '.join(IMAGE_SUFFIXES)}, texts "
                f"in {_TEXT_SUFFIX}, a pair is both under one name"
            )
        items += _new(found, seen, os.fsdecode(source))
    return items


def _new(found: Sequence[Item], seen: set[Any], source: str) -> list[Item]:
    """The items of a source that are not in ``seen``, where they are noted."""
    new: list[Item] = []
    again: list[Item] = []
    for item in found:
        identity = _identity(item)
        (again if identity in seen else new).append(item)
        seen.add(identity)
    if again:
        logger.warning(
            "left out of %s: %d of %d items that were listed before, the first of them %s",
            *(source, len(again), len(found), again[0].name),
        )
    return new


def _identity(item: Item) -> Any:
    """What a row is made of: files or parts of them, whatever their paths, or one line of an index."""
    blobs = [blob for blob in (item.image, item.text) if isinstance(blob, Blob)]
    if not blobs or (item.text is not None and not isinstance(item.text, Blob)):
        path, _, line = item.name.rpartition("#")
        return _real(path), line
    return tuple((_real(blob.path), blob.offset) for blob in blobs)


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    # an index may name what no file can be called
    except ValueError:
        return path


def digest_of(items: Sequence[Item]) -> str:
    """What two lists share only if they are the same: names, places, sizes and when files were changed; pixels are not read."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(tuple(item)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _items_of(source: Path, kind: str) -> Iterator[Item]:
    suffix = source.suffix.lower()
    # unlike Path's own, these take a name that is too long for one of a file that is not there
    if os.path.isdir(source):
        yield from _folder(source, kind)
    elif not os.path.isfile(source):
        if os.path.exists(source):
            raise InputError(f"{str(source)!r} is no regular file; give a file or a folder")
        raise InputError(f"there is no file or folder {str(source)!r}; check the path")
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
        texts = [
            path
            for path in source.parent.iterdir()
            if path.stem == source.stem and path.suffix.lower() == _TEXT_SUFFIX
        ]
        yield from _of_files(_on_disk([source, *texts]), kind)


def _folder(folder: Path, kind: str) -> Iterator[Item]:
    closed: list[OSError] = []
    paths = sorted(_below(folder, closed))
    yield from _of_files(_on_disk(paths), kind)
    for path in paths:
        if path.suffix.lower() == ".tar":
            yield from _tar(path, kind)
    for error in closed:
        _check_listing(error)
        why = unreadable.why(error)
        yield Item(str(error.filename), problem=f"the folder cannot be read ({why})")


def _check_listing(error: OSError) -> None:
    """Raises InputError where the system failed: a list that lacks what is there would be of another job. What may not be
    read is a matter of the list."""
    if unreadable.may_pass(error) and not isinstance(error, PermissionError):
        raise InputError(
            f"{os.fsdecode(error.filename or '')!r} cannot be listed ({unreadable.why(error)})"
        ) from error


def _below(folder: Path, closed: list[OSError]) -> Iterator[Path]:
    """All files below a folder, each folder entered once, however many links lead to it."""
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        # the same way in at every start
        folders.sort()
        real = os.path.realpath(place)
        if real in entered:
            logger.warning("left out %s: another path led to this folder before", place)
            folders.clear()
            continue
        entered.add(real)
        yield from (Path(place, name) for name in names)


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
            None if os.path.isfile(path) else _NO_FILE,
        )
        for path in sorted(paths)
        if path.suffix.lower() in (*IMAGE_SUFFIXES, _TEXT_SUFFIX)
    ]


def _of_files(files: Sequence[_File], kind: str) -> Iterator[Item]:
    texts: dict[str, list[_File]] = {}
    for file in files:
        if file.suffix == _TEXT_SUFFIX:
            texts.setdefault(file.key, []).append(file)
    for file in files:
        if file.suffix == _TEXT_SUFFIX:
            if kind == "text":
                yield Item(file.name, text=file.blob, problem=file.problem)
        elif kind == "image":
            yield Item(file.name, image=file.blob, problem=file.problem)
        elif kind == "pair":
            own = texts.get(file.key, [])
            yield Item(
                file.name,
                file.blob,
                own[0].blob if len(own) == 1 else None,
                file.problem or _problem_of_texts(own),
            )


def _problem_of_texts(texts: Sequence[_File]) -> str | None:
    """Why these are not the one text of a pair."""
    if len(texts) == 1:
        return texts[0].problem
    if not texts:
        return f"there is no {_TEXT_SUFFIX} file with its name"
    return f"{texts[0].name} and {texts[1].name} both have its name; leave one of them"


def _tar(path: Path, kind: str) -> Iterator[Item]:
    files, problem = _members(path)
    yield from _of_files(files, kind)
    if problem is not None:
        yield Item(str(path), problem=problem)


def _members(path: Path) -> tuple[list[_File], str | None]:
    """The images and texts of a tar, and what is wrong with the rest of it."""
    if not os.path.isfile(path):
        return [], _NO_FILE
    # of members of one name the last counts, as when they are unpacked
    files: dict[str, _File] = {}
    again: list[str] = []
    hidden: list[str] = []
    problem: str | None = None
    changed = state_of_file(str(path))[1]
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
            for member in tar:
                file = _member(path, member, changed)
                if file is not None and _is_hidden(file):
                    hidden.append(file.name)
                elif file is not None:
                    again += [file.name] if file.name in files else []
                    files[file.name] = file
            problem = _behind(raw, tar.offset)
    except OSError as error:
        error.filename = str(path)
        _check_listing(error)
        problem = f"it cannot be read ({unreadable.why(error)})"
    except (tarfile.TarError, EOFError, ValueError) as error:
        problem = f"it is damaged or no plain tar ({error})"
    for names, why in ((again, "have the name of a later one"), (hidden, "begin with a dot")):
        if names:
            logger.warning(
                "left out of %s: %d members that %s, the first of them %s",
                *(path, len(names), why, names[0]),
            )
    return list(files.values()), problem


def _member(path: Path, member: tarfile.TarInfo, changed: int) -> _File | None:
    """A member that is an image or text by its name."""
    folder, _, name = member.name.rpartition("/")
    key, _, extension = name.partition(".")
    suffix = f".{extension.rpartition('.')[2].lower()}"
    if member.isdir() or suffix not in (*IMAGE_SUFFIXES, _TEXT_SUFFIX):
        return None
    problem = None
    if member.issym() or member.islnk():
        problem = f"it is a link to {member.linkname!r}; put the file itself into the tar"
    elif not member.isreg() or member.issparse():
        problem = "it is no regular file of the tar, or a sparse one"
    blob = Blob(str(path), member.offset_data, member.size, changed)
    return _File(f"{path}/{member.name}", f"{folder}/{key}", suffix, blob, problem)


def _is_hidden(member: _File) -> bool:
    """Whether a member of a tar has no key, which webdataset passes over: what other programs keep beside a file."""
    return member.key.endswith("/")


def _behind(raw: BinaryIO, end: int) -> str | None:
    """What is wrong behind the last member that tarfile gives; nothing where only zeros follow."""
    raw.seek(end)
    # tarfile takes damage behind the first header for the end
    if any(raw.read(_BLOCK)):
        return f"it is damaged at byte {end}; what follows is lost"
    while rest := raw.read(_CHUNK):
        if rest.strip(b"\0"):
            return (
                f"more follows its end at byte {end}, another tar perhaps, and is not read; name tars one by one, or join "
                "them with tar --concatenate"
            )
    return None


def _index(path: Path, kind: str) -> Iterator[Item]:
    seen: set[Path] = set()
    try:
        opened = path.open("rb")
    except OSError as error:
        raise InputError(
            f"the index file {str(path)!r} cannot be read ({unreadable.why(error)})"
        ) from error
    with opened as file:
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
