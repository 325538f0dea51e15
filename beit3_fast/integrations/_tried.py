"""The classes that an encoder is made of and their code, as they were when its results were tried.

What is replaced, reloaded or patched later, on a class too, keeps its name; it was not tried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from torch import nn

# Of torch.nn.Module, how a module's code is reached.
_CALLS = ("forward", "__call__", "_call_impl")


class Tried:
    """Classes with every method and plain value that they define or inherit, torch.nn.Module's own left out.

    A pickled one comes back with the classes whose code is the same there.
    """

    def __init__(self, classes: Iterable[type] = ()) -> None:
        self._classes = frozenset(classes)
        self._watched = [
            (cls, name) for cls in sorted(self._classes, key=_label) for name in _names(cls)
        ]
        self._state = self._read()

    def __deepcopy__(self, memo: object) -> Tried:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        unchanged = () if self._read() != self._state else self._classes
        return _where_the_same, ({cls: _digest(cls) for cls in unchanged},)

    def doubt(self, classes: frozenset[type]) -> str | None:
        """Why an encoder of these classes, as they are now, was not tried; None when it was."""
        if not classes <= self._classes:
            new = min(_label(cls) for cls in classes - self._classes)
            return f"{new}, a class that was not tried; accelerate the model again"
        state = self._read()
        if state != self._state:
            places = [f"{_label(cls)}.{name}" for cls, name in self._watched] * 2
            pairs = zip(places, state, self._state, strict=True)
            place = next(place for place, now, then in pairs if now != then)
            return f"{place}, which has changed since it was tried; accelerate the model again"
        return None

    def _read(self) -> list[Any]:
        values = [getattr(cls, name, None) for cls, name in self._watched]
        return values + [getattr(value, "__code__", None) for value in values]


def _where_the_same(digests: dict[type, str]) -> Tried:
    return Tried(cls for cls, digest in digests.items() if _digest(cls) == digest)


def _label(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _names(cls: type) -> Iterator[str]:
    own = [base for base in cls.__mro__ if base not in nn.Module.__mro__]
    names = {name for base in own for name in vars(base) if not name.startswith("__")}
    for name in sorted(names.union(_CALLS)):
        if _plain(getattr(cls, name, None)) is not None:
            yield name


def _digest(cls: type) -> str:
    """Of the code, wherever its file lies; the same in every process of one version of Python."""
    plain = [(name, _plain(getattr(cls, name, None))) for name in _names(cls)]
    return hashlib.sha256(repr(plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """What a value says, without addresses and places in files; None for what is no code and no plain value."""
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, _plain(value.co_consts)
    if isinstance(value, property):
        return "property", _plain(value.fget)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(repr(_plain(item)) for item in value)
    if callable(value):
        parts = ("__code__", "__defaults__", "__wrapped__")
        return [_plain(getattr(value, part, None)) for part in parts]
    plain = (bool, int, float, str, bytes, type(None))
    return repr(value) if isinstance(value, plain) else None
