"""Every option of a recipe with its default, from the dataclasses that the sections are made of."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any


def option_text(recipe: type[Any], config: type[Any], sections: Mapping[str, Any]) -> str:
    """What a recipe file may say: ``recipe`` and ``config`` document ``[model]``, each section's class the rest."""
    parts = [_section("model", config, inspect.getdoc(recipe) or "")]
    parts += [_section(name, make) for name, make in sections.items()]
    return "\n\n".join(parts)


def _section(name: str, make: type[Any], before: str = "") -> str:
    fields = [f"  {own.name} = {_default(own)}" for own in dataclasses.fields(make)]
    texts = [_indented(text) for text in (before, inspect.getdoc(make) or "") if text]
    return "\n\n".join(["\n".join([f"[{name}]", *fields]), *texts]).rstrip()


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or value == ():
        return "(none)"
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
