from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from beit3_fast.data import Processor
from beit3_fast.model import create_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from embed_cases import Data
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
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("data"))
