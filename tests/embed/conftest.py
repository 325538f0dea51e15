from __future__ import annotations

import pytest
from embed_cases import Data
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
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("data"))
