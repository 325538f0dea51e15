from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from beit3_fast.data import Processor
from beit3_fast.model import create_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from spm import tiny_sentencepiece_bytes


@pytest.fixture(scope="session")
def model() -> object:
    """A tiny retrieval model whose images and texts differ from each other."""
    model = create_model("beit3_tiny_patch16_32_retrieval")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="session")
def processor(model: object) -> Processor:
    return Processor.for_model(model, tiny_sentencepiece_bytes())


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """Pieces of real photographs, uint8 [H, W, 3]."""
    data = pytest.importorskip("skimage.data")
    cat, coffee = data.chelsea(), data.coffee()
    return [cat[:200, :200], cat[100:, 200:], coffee[:, :300], coffee[50:300, 300:]]
