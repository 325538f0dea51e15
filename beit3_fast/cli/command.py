"""What a subcommand is, and what several of them need."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from beit3_fast.errors import Beit3FastError
from beit3_fast.finite import for_json


@dataclass(frozen=True)
class Command:
    """A subcommand: ``arguments`` adds its options to a parser, ``run`` does the work and returns the exit code."""

    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def complain(command: str, why: str) -> None:
    """One line on stderr; of a message of several the listing of a file that fits nowhere is cut, its first words are kept."""
    parts = [part.strip() for part in why.splitlines()]
    room = 160 if len(why) > 1200 else len(why)
    line = "; ".join(part if len(part) <= room else part[:room] + " ..." for part in parts)
    print(f"beit3-fast {command}: {line}", file=sys.stderr)


def said_by(error: Beit3FastError) -> str:
    """The message of an error, with the mend that a command has where that of Python is another."""
    from beit3_fast.checkpoint import CheckpointMismatch

    if isinstance(error, CheckpointMismatch):
        return f"{error.what}\n  name the model that the file is of, or give the file of this one"
    return str(error)


def version_of(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def print_json(report: Any, indent: int | None = 2) -> None:
    """Print a document that every reader takes: plain ASCII, null for numbers that are not finite."""
    print(json.dumps(for_json(report), indent=indent, allow_nan=False))
