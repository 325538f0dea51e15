"""The official index files: a line of JSON for each sample, image paths and token ids."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from beit3_fast.errors import InputError

KINDS = ("image", "text", "pair")


class IndexRow(NamedTuple):
    """A sample: the path of its image, and its text, token ids without bos and eos or a sentence."""

    image: str | None = None
    text: str | tuple[int, ...] | None = None


def read_index(path: str | PathLike[str], kind: str) -> list[IndexRow]:
    """What the lines of an index file have of a kind, "image", "text" or "pair"; image paths count from its own folder.

    A line of two images is two rows of kind "image". Raises InputError for a file or a line that cannot be used, naming it.
    """
    path = Path(path)
    rows: list[IndexRow] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"the index file {str(path)!r} cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            images, text = images_and_text(json.loads(line), kind)
        except (InputError, ValueError, RecursionError) as error:
            raise InputError(f"line {number} of {str(path)!r} cannot be used ({error})") from error
        places = [str(path.parent / image) for image in images]
        rows += [IndexRow(place, text) for place in places] if places else [IndexRow(None, text)]
    return rows


def images_and_text(entry: Any, kind: str) -> tuple[list[str], str | tuple[int, ...] | None]:
    """Image paths and text of a line, those that the kind needs. Raises InputError for one that does not have them."""
    if not isinstance(entry, dict):
        raise InputError("expected a JSON object")
    images: list[str] = []
    text = None
    if kind != "text":
        images = [entry[key] for key in ("image_path", "image2_path") if key in entry]
        if not images or not all(isinstance(image, str) and image for image in images):
            raise InputError('expected "image_path": "..."')
        if kind == "pair" and len(images) > 1:
            raise InputError("it has two images, a pair is one image and one text")
    if kind != "image":
        text = entry.get("text_segment")
        if isinstance(text, list) and all(type(token) is int for token in text):
            text = tuple(text)
        elif not isinstance(text, str):
            raise InputError('expected "text_segment", a list of token ids or a sentence')
    return images, text
