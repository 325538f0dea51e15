from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spm import train_tiny_sentencepiece

from beit3_fast.data import Tokenizer
from bench.torchscale_heads import import_torchvision


@pytest.fixture(scope="session")
def spm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 90 pieces, trained once per test process."""
    return train_tiny_sentencepiece(tmp_path_factory.mktemp("spm") / "tiny.spm")


@pytest.fixture(scope="session")
def tokenizer(spm_path: Path) -> Tokenizer:
    return Tokenizer(spm_path)


@pytest.fixture(scope="session")
def photos() -> dict[str, np.ndarray]:
    """Real photographs, uint8 [H, W, 3] or [H, W], none of them square with a power of two."""
    data = pytest.importorskip("skimage.data")
    datasets = pytest.importorskip("sklearn.datasets")
    return {
        "chelsea": data.chelsea(),
        "coffee": data.coffee(),
        "china": datasets.load_sample_image("china.jpg"),
        "flower": datasets.load_sample_image("flower.jpg")[:, :301],
        "coins": data.coins(),
    }


@pytest.fixture(scope="session")
def transforms() -> Any:
    """torchvision.transforms, also where torchvision's compiled part was made for another PyTorch."""
    try:
        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    return import_module("torchvision.transforms")


@pytest.fixture(scope="session")
def small(photos: dict[str, np.ndarray]) -> np.ndarray:
    """A piece of a photograph, uint8 [40, 60, 3], different at every corner."""
    return np.ascontiguousarray(photos["chelsea"][100:140, 150:210])
