"""TOML files whose sections are dataclasses: every field by its Python name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from beit3_fast import unreadable
from beit3_fast.errors import ConfigError


def read_tables(path: str | PathLike[str]) -> dict[str, Any]:
    """What a TOML file says, as dictionaries. Raises ConfigError for what cannot be read."""
    path = Path(path)
    try:
        toml = import_module("tomllib")
    except ModuleNotFoundError:
        raise ConfigError("a recipe needs Python 3.11 or newer, which can read TOML") from None
    try:
        return toml.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the recipe {str(path)!r} cannot be read ({unreadable.why(error)})"
        ) from error


def read_sections(
    path: Path, tables: Mapping[str, Any], sections: Mapping[str, Any], example: str
) -> dict[str, Any]:
    """The tables as objects of the ``sections``' dataclasses; ``[model]`` stays a dictionary and needs a name.

    Raises ConfigError for a section or a field that is not known, with those that are, and where there is no name, with
    ``example``.
    """
    known = ["model", *sections]
    made: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in known or not isinstance(table, dict):
            raise ConfigError(f"{path}: expected sections {known}, got {name!r}")
        made[name] = table if name == "model" else _section(path, name, sections[name], table)
    if not isinstance(made.get("model", {}).get("name"), str):
        raise ConfigError(f'{path}: [model] needs a name, such as "{example}"')
    check_name(f"{path}: [model] checkpoint", made["model"].get("checkpoint"))
    return made


def check_name(field: str, value: Any) -> None:
    """Raises ConfigError for what names no file, None apart."""
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{field} must name a file, got {value!r}")


def check_count(field: str, value: Any, least: int) -> None:
    """Raises ConfigError for what is no integer, or a smaller one."""
    if type(value) is not int or value < least:
        raise ConfigError(f"{field} must be an integer of at least {least}, got {value!r}")


def check_apart(held_out: Iterable[str], trained_on: Iterable[str]) -> None:
    """Raises ConfigError for image files that are in both."""
    known = {os.path.realpath(name) for name in trained_on}
    both = {name for name in held_out if os.path.realpath(name) in known}
    if both:
        raise ConfigError(
            f"[held_out] must name images that [data] does not, got {min(both)!r} in both, and {len(both)} such images in "
            "all; take them out of either"
        )


def names_of(value: Any, field: str, what: str) -> list[str]:
    """What a field names: one ``what`` or a list of them. Raises ConfigError for anything else."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{field} must be {what} or a list of them, got {value!r}")
    return list(names)


def _section(path: Path, name: str, make: Any, table: dict[str, Any]) -> Any:
    fields = [own.name for own in dataclasses.fields(make)]
    unknown = [key for key in table if key not in fields]
    if unknown:
        raise ConfigError(f"{path}: [{name}] has no field {unknown[0]!r}; it has {fields}")
    try:
        return make(**table)
    except ConfigError as error:
        raise ConfigError(f"{path}: [{name}] {error}") from error
