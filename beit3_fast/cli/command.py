"""What a subcommand is, and what several of them need."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from beit3_fast.errors import Beit3FastError, CheckpointError, ConfigError
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


def said_by(error: Beit3FastError, arguments: argparse.Namespace) -> str:
    """The message of an error, with the mend that a command has where that of Python is another."""
    from beit3_fast.checkpoint import CheckpointMismatch

    if not isinstance(error, CheckpointMismatch):
        return str(error)
    if error.is_of_heads:
        for option in ("num_classes", "labels", "answers"):
            if hasattr(arguments, option):
                return f"{error.what}\n  if the model is right, say how many classes it has: --{option.replace('_', '-')}"
    if error.report.rejected:
        return error.what
    return f"{error.what}\n  name the model that the file is of, or give the file of this one"


@contextmanager
def said_in_options(options: Mapping[str, str]) -> Iterator[None]:
    """Errors about the arguments of a function in the words of the command line: ``options`` maps one to the other."""
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        words = "|".join(map(re.escape, options))
        said = re.sub(rf"\b(?:{words})(?!\w)", lambda found: options[found[0]], str(error))
        if said == str(error):
            raise
        raise type(error)(said) from error


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
