"""The official index files: a line of JSON for each sample, image paths and token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from beit3_fast import unreadable
from beit3_fast.data.tokenizer import UNK
from beit3_fast.errors import InputError

T = TypeVar("T")

_MOST_IDS = 2**31

KINDS = ("image", "text", "pair")


class IndexRow(NamedTuple):
    """A sample: the path of its image, and its text, token ids without bos and eos or a sentence."""

    image: str | None = None
    text: str | tuple[int, ...] | None = None


def read_index(path: str | PathLike[str], kind: str) -> list[IndexRow]:
    """What the lines of an index file have of a kind, "image", "text" or "pair"; image paths count from its own folder.

    A line of two images is two rows of kind "image". Raises InputError for a file or a line that cannot be used, naming it.
    """
    folder = Path(path).parent
    rows: list[IndexRow] = []
    for images, text in read_entries(path, lambda entry: images_and_text(entry, kind)):
        places = [str(folder / image) for image in images]
        rows += [IndexRow(place, text) for place in places] if places else [IndexRow(None, text)]
    return rows


def names_of_images(images: Sequence[str]) -> list[str]:
    """Paths without the folder that all share, so that a data set which was moved has the same ones."""
    if not images:
        return []
    first, last = min(images), max(images)
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    )
    shared = first.rfind("/", 0, same) + 1
    return [image[shared:] for image in images]


def check_ids(texts: Iterable[str | tuple[int, ...] | None], vocabulary: int) -> None:
    """Raises InputError for a token id that a model with ``vocabulary`` embeddings does not have."""
    most = max((max(text) for text in texts if isinstance(text, tuple)), default=0)
    if most >= vocabulary:
        raise InputError(
            f"a text of the index files has token id {most}, the model only 0 to {vocabulary - 1}; name index files of the "
            "same tokenizer, or set [model] vocab_size"
        )


def read_entries(path: str | PathLike[str], make: Callable[[Any], T]) -> list[T]:
    """What ``make`` makes of each line of JSON. Raises InputError, naming file and line, where a line cannot be used."""
    path = Path(path)
    made: list[T] = []
    try:
        # Not splitlines: sentences may hold what Python takes for the end of a line, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(
            f"the index file {str(path)!r} cannot be read ({unreadable.why(error)})"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            made.append(make(json.loads(line)))
        except (InputError, ValueError, RecursionError) as error:
            raise InputError(f"line {number} of {str(path)!r} cannot be used ({error})") from error
    return made


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
            unfit = [token for token in text if not 0 <= token < _MOST_IDS]
            if unfit:
                raise InputError(f"token ids are numbers from 0 to {_MOST_IDS - 1}, got {unfit[0]}")
            text = tuple(text)
        elif text is None and "text_segment" in entry:
            raise InputError(
                "its text_segment is null, as in official captioning files for validation and test; name files with texts"
            )
        elif not isinstance(text, str):
            raise InputError('expected "text_segment", a list of token ids or a sentence')
        if not has_words(text):
            raise InputError(f"its text_segment {text!r:.40} has no words; leave the line out")
    return images, text


def check_words(text: Any, what: str) -> None:
    """Raises InputError, naming ``what`` it is, for a str without words; what else may come is looked at elsewhere."""
    if isinstance(text, str) and not has_words(text):
        raise InputError(f"{what}, {text!r:.40}, has no words; leave it out")


def has_words(text: str | tuple[int, ...]) -> bool:
    """Whether anything is left between bos and eos that could be hidden."""
    if isinstance(text, str):
        return any(letter.isprintable() and not letter.isspace() for letter in text)
    return any(token >= UNK for token in text)
