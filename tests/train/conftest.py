"""One world for all training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_cases import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))
