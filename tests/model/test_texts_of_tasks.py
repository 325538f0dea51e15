"""What the tasks make of texts that are padded, empty or long, and of letters that come in several tokens."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from spm import tiny_sentencepiece_bytes

from beit3_fast.data import Processor
from beit3_fast.data.tokenizer import BOS, EOS, PAD
from beit3_fast.errors import InputError
from beit3_fast.model import create_model
from beit3_fast.retrieval import EmbeddingIndex, zero_shot_classifier


@pytest.fixture(scope="module")
def retrieval() -> Any:
    torch.manual_seed(0)
    return create_model("beit3_tiny_patch16_32_retrieval")


@pytest.fixture(scope="module")
def processor(retrieval: Any) -> Processor:
    return Processor.for_model(retrieval, tiny_sentencepiece_bytes())


def test_padding_behind_the_end_is_cut_off(retrieval: Any, processor: Processor) -> None:
    texts = ["a cup", "A red cup of coffee stands on a wooden table."]
    padded = processor(text=texts)["text_tokens"]
    assert (padded[0] == PAD).any()
    expected = retrieval.encode_text(texts, processor=processor)
    for given in (padded, list(padded)):
        assert torch.equal(retrieval.encode_text(given), expected)
    answering = create_model("beit3_tiny_patch16_32_vqav2", num_classes=4)
    image = torch.randn(3, 32, 32)
    found = answering.answer(image, padded)
    assert found == answering.answer(image, texts, processor=processor)


def test_ids_that_are_no_padding_stay() -> None:
    """Without an end in front of them they may be what a caller trained with."""
    from beit3_fast.model.inputs import text_tensors

    device = torch.device("cpu")
    for ids in ([BOS, 7, PAD, 8, EOS], [7, PAD], [PAD]):
        (found,) = text_tensors(torch.tensor([ids]), None, device)
        assert found.tolist() == ids
    (found,) = text_tensors(torch.tensor([BOS, PAD, EOS, PAD, PAD]), None, device)
    assert found.tolist() == [BOS, PAD, EOS]


@pytest.mark.parametrize("empty", ["", " \t "])
def test_a_text_without_words_is_refused(empty: str, retrieval: Any, processor: Processor) -> None:
    with pytest.raises(InputError, match=r"text 1, .*, has no words; leave it out"):
        retrieval.encode_text(["a cup", empty], processor=processor)
    with pytest.raises(InputError, match=r"label 1, .*, has no words"):
        zero_shot_classifier(retrieval, ["a cup", empty], processor=processor)
    index = EmbeddingIndex.build(retrieval, torch.randn(1, 3, 32, 32), ["one"])
    with pytest.raises(InputError, match="has no words"):
        index.search_text(retrieval, empty, processor=processor)


def test_no_texts_at_all(retrieval: Any, processor: Processor) -> None:
    with pytest.raises(InputError, match="a list of at least one, got an empty list"):
        retrieval.encode_text([], processor=processor)


def test_the_log_says_what_is_cut(
    retrieval: Any, processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    short = "A red cup of coffee."
    assert len(processor.tokenizer.encode("cup " * 200)) > 62  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING, "beit3_fast"):
        retrieval.encode_text([short], processor=processor)
        assert not caplog.records
        retrieval.encode_text([short, "cup " * 200, "table " * 200], processor=processor)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "texts cut behind 64 tokens: 2 of 3, the first of them text 1, 'cup cup"
    )


def test_letters_of_several_tokens_are_streamed_whole() -> None:
    content = tiny_sentencepiece_bytes(350, byte_fallback=True)
    torch.manual_seed(0)
    model = create_model("beit3_tiny_patch16_32_captioning", vocab_size=360)
    processor = Processor.for_model(model, content)
    assert processor.tokenizer is not None
    held = 0
    for seed in range(60):
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed))
        options: dict[str, Any] = {"sample": True, "seed": seed, "processor": processor}
        ((caption,),) = model.caption(image, 1, 16, 0.0, **options)
        steps = list(model.stream_caption(image, 16, **options))
        assert "".join(step.text for step in steps) == caption.text
        assert tuple(step.token for step in steps) == caption.tokens
        held += sum(step.text == "" for step in steps)
    assert held


def test_numbers_of_numpy_are_numbers() -> None:
    model = create_model("beit3_tiny_patch16_32_captioning")
    image = torch.randn(3, 32, 32)
    expected = model.caption(image, 2, 6, mask_id=91)
    assert model.caption(image, np.int64(2), np.int32(6), mask_id=91) == expected
