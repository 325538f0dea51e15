"""What became of the steps of ``make gpu``: steps.json, and the sources that an outcome speaks of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SUFFIXES = {".py", ".json", ".cu", ".cuh", ".h", ".cpp"}
# Written by what runs, or results.
_NOT_SOURCES = {"_build.json", "verified.json"}
_NOT_FOLDERS = {"__pycache__", "results", "out"}
Record = dict[str, dict[str, Any]]


def digest(root: Path, folders: Iterable[str], facts: Sequence[str]) -> str:
    """A hash of the source files in some folders of ``root``, of files and patterns of files, and of further facts."""
    own = hashlib.sha256()
    for fact in facts:
        own.update(f"{fact}\0".encode())
    for folder in folders:
        inside = (root / folder).is_dir()
        for path in sorted((root / folder).rglob("*") if inside else root.glob(folder)):
            name = path.relative_to(root)
            if path.suffix not in SUFFIXES or path.name in _NOT_SOURCES:
                continue
            if _NOT_FOLDERS.isdisjoint(name.parts) and path.is_file():
                own.update(f"{name.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return own.hexdigest()[:16]


def read(path: Path) -> tuple[Record, str]:
    """The record, and a message: empty, or why a damaged one was put aside for a fresh start."""
    if not path.exists():
        return {}, ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        steps = content["steps"]
        if content["schema"] != 1 or not all("outcome" in own for own in steps.values()):
            raise ValueError("no record of this schema")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        aside = path.with_name(path.name + ".damaged")
        path.replace(aside)
        return {}, (
            f"{path.name} cannot be read ({type(error).__name__}: {error}); it is kept as {aside.name}, and every "
            "step runs again"
        )
    return steps, ""


def write(path: Path, record: Record) -> None:
    """Replaces the file as a whole, so that a run that is cut off leaves the old one or the new one."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"schema": 1, "steps": record}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
