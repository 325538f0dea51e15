from __future__ import annotations

import numpy as np
import pytest
from products import retrieval_model
from spm import tiny_sentencepiece_bytes

from beit3_fast.data import Processor


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
