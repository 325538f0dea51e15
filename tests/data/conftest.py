from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spm import train_tiny_sentencepiece

from beit3_fast.data import Tokenizer

_SHIM: list[torch.library.Library] = []


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
        import torchvision.transforms as transforms
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SHIM.append(library)
        import torchvision.transforms as transforms
    return transforms


@pytest.fixture(scope="session")
def small(photos: dict[str, np.ndarray]) -> np.ndarray:
    """A piece of a photograph, uint8 [40, 60, 3], different at every corner."""
    return np.ascontiguousarray(photos["chelsea"][100:140, 150:210])
