from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from beit3_fast.data import Processor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from products import retrieval_model
from spm import tiny_sentencepiece_bytes


@pytest.fixture(scope="session")
def model() -> object:
    return retrieval_model()


@pytest.fixture(scope="session")
def processor(model: object) -> Processor:
    return Processor.for_model(model, tiny_sentencepiece_bytes())


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """Pieces of real photographs, uint8 [H, W, 3]."""
    data = pytest.importorskip("skimage.data")
    cat, coffee = data.chelsea(), data.coffee()
    return [cat[:200, :200], cat[100:, 200:], coffee[:, :300], coffee[50:300, 300:]]
