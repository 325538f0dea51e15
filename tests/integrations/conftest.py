from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def runs_fast(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, dict[str, Any]], bool]:
    """Whether a call of a model reaches the packed computation."""
    from beit3_fast.integrations import _encoder_forward

    calls: list[str] = []
    for name in ("encode_rows", "encode_incremental"):
        real = getattr(_encoder_forward, name)

        def spy(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(_encoder_forward, name, spy)

    def runs(model: Any, call: dict[str, Any]) -> bool:
        calls.clear()
        model(**call)
        return bool(calls)

    return runs


@pytest.fixture(autouse=True)
def _quiet_logger() -> Iterator[None]:
    yield
    assert logging.getLogger("beit3_fast").level == logging.NOTSET
