"""Every option of a recipe with its default, from the dataclasses that the sections are made of."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any


def option_text(recipe: type[Any], sections: Mapping[str, Any]) -> str:
    """What a recipe file may say: ``recipe`` documents ``[model]``, each section's class the rest."""
    parts = [f"[model]\n{_indented(inspect.getdoc(recipe) or '')}"]
    for name, make in sections.items():
        fields = [f"  {own.name} = {_default(own)}" for own in dataclasses.fields(make)]
        parts.append(
            "\n".join([f"[{name}]", *fields, "", _indented(inspect.getdoc(make) or "")]).rstrip()
        )
    return "\n\n".join(parts)


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or value == ():
        return "(none)"
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
