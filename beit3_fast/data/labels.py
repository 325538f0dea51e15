"""Names of classes: the official answer file, or a text file with one name a line."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from beit3_fast import unreadable
from beit3_fast.errors import InputError

_MAX_BYTES = 64 << 20


def read_labels(path: str | PathLike[str]) -> tuple[str, ...]:
    """The names of classes 0, 1, ... from a file.

    Either lines of JSON, ``{"answer": "yes", "label": 3}``, in any order (the official answer2label.txt), or one name
    a line, the first for class 0. Raises InputError for a file that cannot be read, is neither, or leaves a class
    without a name.
    """
    text = _text(path)
    # not splitlines: names may hold what Python takes for the end of a line, such as U+2028
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(
            f"the label file {os.fspath(path)!r} is empty; give answer2label.txt, or one name a line"
        )
    if not lines[0].lstrip().startswith("{"):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise InputError(
                    f"line {number} of {os.fspath(path)!r} names no class; classes are counted by lines"
                )
        return tuple(line.strip() for line in lines)
    names: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, label = entry["answer"], entry["label"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = label = None
        if not isinstance(name, str) or type(label) is not int:
            raise InputError(
                f'line {number} of {os.fspath(path)!r} must be {{"answer": "...", "label": 0}}, got {line.strip()[:60]!r}'
            )
        if label in names:
            raise InputError(f"line {number} of {os.fspath(path)!r} names class {label} again")
        names[label] = name
    missing = next((index for index in range(len(names)) if index not in names), None)
    if missing is not None:
        raise InputError(
            f"{os.fspath(path)!r} names {len(names)} classes, but not class {missing}; labels count from 0 without gaps"
        )
    return tuple(names[index] for index in range(len(names)))


def labels_for(
    labels: str | PathLike[str] | Sequence[str] | None, classes: int
) -> tuple[str, ...] | None:
    """Names from a file, a list, or none at all. Raises InputError unless there is one for each class."""
    if labels is None:
        return None
    names: Any = read_labels(labels) if isinstance(labels, (str, PathLike)) else labels
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InputError(f"labels must be a file or a list of str, got {labels!r:.80}")
    if len(names) != classes:
        raise InputError(
            f"the model has {classes} classes, got {len(names)} labels; use the file that it was trained with"
        )
    return tuple(names)


def _text(path: str | PathLike[str]) -> str:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(
                f"expected a label file, but {os.fspath(path)!r} is a folder or no regular file; give the file"
            )
        if status.st_size > _MAX_BYTES:
            raise InputError(
                f"expected a label file of at most {_MAX_BYTES} bytes, got {os.fspath(path)!r}"
            )
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the label file {os.fspath(path)!r} is no text in UTF-8 ({error}); give answer2label.txt, or one name a line"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the label file {path!r} cannot be read ({unreadable.why(error)})"
        ) from error
