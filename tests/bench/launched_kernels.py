"""A plugin of pytest: tests run in Triton's interpreter until every kernel was launched, else the run fails and says which was not."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from triton.runtime.interpreter import InterpretedFunction

from beit3_fast import kernels

Name = tuple[str, str]
_run = InterpretedFunction.run


def _name(kernel: InterpretedFunction) -> Name:
    return kernel.fn.__module__, kernel.fn.__name__


def _kernels() -> Iterator[Name]:
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for name, own in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and isinstance(own, InterpretedFunction):
                yield _name(own)


_missing: set[Name] = set()


def pytest_configure() -> None:
    _missing.update(_kernels())

    def run(self: InterpretedFunction, *args: Any, **named: Any) -> Any:
        _missing.discard(_name(self))
        return _run(self, *args, **named)

    InterpretedFunction.run = run


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of each file in turn: every kernel is met soon."""
    of_file = Counter[Path]()
    turns = {}
    for item in items:
        turns[item] = of_file[item.path]
        of_file[item.path] += 1
    items.sort(key=turns.__getitem__)


def pytest_runtest_setup() -> None:
    if not _missing:
        pytest.skip("every kernel was launched")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _missing:
        print("\nnever launched:", sorted(_missing))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
