"""What every test gets: its own seed, one hypothesis profile, and NaN wherever memory is not written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Read by triton where it is first imported, which other packages do, too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent
POISONED = (TESTS / "ops", TESTS / "model")


def pytest_configure(config: pytest.Config) -> None:
    try:
        from hypothesis import HealthCheck, settings
    except Exception:
        return
    unhurried = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("gate", derandomize=True, max_examples=60, **unhurried)
    settings.register_profile("full", max_examples=1000, **unhurried)
    matrices = "full" in config.option.markexpr and config.option.markexpr.strip() != "not full"
    settings.load_profile("full" if matrices else "gate")


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same start for every test, in any order and on any worker."""
    monkeypatch.delenv("BEIT3_FAST_IMPL", raising=False)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ops and models run with NaN in every tensor that PyTorch hands out uninitialised.

    A result that shows a NaN has read, or left unwritten, memory that nobody filled.
    """
    if not any(folder in request.path.parents for folder in POISONED):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
            yield
    finally:
        torch.use_deterministic_algorithms(before)
