"""What a subcommand is, and what several of them need."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from beit3_fast.finite import for_json


@dataclass(frozen=True)
class Command:
    """A subcommand: ``arguments`` adds its options to a parser, ``run`` does the work and returns the exit code."""

    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


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
