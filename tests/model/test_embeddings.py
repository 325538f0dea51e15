"""encode_image, encode_text and encode_pair against the forward that they shorten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import FORMS, backbone, images, padding, task_model, texts
from torch import Tensor

from beit3_fast.errors import Beit3FastError
from beit3_fast.model import create_model

LENGTHS = [5, 2, 7]
IMAGES, TEXTS = images(3), texts(3, 7)
IDS = [TEXTS[i, :n] for i, n in enumerate(LENGTHS)]
PAD = padding(LENGTHS, 7)


def rows_of(model: Any, image: Tensor | None, text: Tensor | None) -> list[Tensor]:
    """Every sample's own rows of the padded forward, vision first."""
    out = model(text, image, None if text is None else PAD)["encoder_out"]
    vision = out.shape[1] - (0 if text is None else text.shape[1])
    lengths = [vision + (0 if text is None else n) for n in LENGTHS]
    return [own[:length] for own, length in zip(out, lengths, strict=True)]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_backbone(form: str) -> None:
    model = backbone(FORMS[form])
    own_images = images(3, FORMS[form])
    calls = {
        "image": (model.encode_image, (own_images,), rows_of(model, own_images, None), 0),
        "text": (model.encode_text, (IDS,), rows_of(model, None, TEXTS), 0),
        "pair": (model.encode_pair, (own_images, IDS), rows_of(model, own_images, TEXTS), 0),
    }
    for encode, inputs, expected, first in calls.values():
        for batch_size in (1, 2, 8):
            tokens = encode(*inputs, "tokens", batch_size=batch_size)
            cls = encode(*inputs, "cls", batch_size=batch_size)
            pooled = encode(*inputs, batch_size=batch_size)
            for index, rows in enumerate(expected):
                assert torch.allclose(tokens[index], rows, atol=1e-5)
                assert torch.allclose(cls[index], rows[first], atol=1e-5)
                assert torch.allclose(pooled[index], rows.mean(0), atol=1e-5)


@torch.no_grad()
def test_what_retrieval_models_are_trained_for() -> None:
    model = task_model("retrieval")
    vision, language = model(IMAGES, TEXTS, PAD, only_infer=True)
    assert torch.allclose(model.encode_image(IMAGES, batch_size=2), vision, atol=1e-6)
    assert torch.allclose(model.encode_text(IDS, batch_size=2), language, atol=1e-6)
    rows = model.encode_pair(IMAGES, IDS, "tokens")
    assert torch.allclose(model.encode_pair(IMAGES, IDS)[1], rows[1].mean(0))


@torch.no_grad()
def test_what_the_heads_of_the_others_read() -> None:
    model = task_model("vqav2")
    pooled = model.encode_pair(IMAGES, IDS)
    assert torch.allclose(model.head(pooled), model(IMAGES, TEXTS, PAD), atol=1e-5)
    for task in ("captioning", "nlvr2", "imageclassification", "vqav2"):
        model = task_model(task)
        assert torch.equal(model.encode_image(IMAGES), model.beit3.encode_image(IMAGES))


@torch.no_grad()
def test_sizes_and_kinds_that_mix() -> None:
    model = task_model("retrieval")
    mixed = [IMAGES[0], torch.randn(3, 48, 16), IMAGES[2]]
    together = model.encode_image(mixed)
    for own, image in zip(together, mixed, strict=True):
        assert torch.allclose(own, model.encode_image(image)[0], atol=1e-6)
    assert torch.allclose(model.encode_image(IMAGES.double()), model.encode_image(IMAGES))
    assert torch.equal(model.encode_text(TEXTS), model.encode_text(list(TEXTS)))


def test_the_rows_may_be_trained_on() -> None:
    head = torch.nn.Linear(64, 2)
    head(task_model("retrieval").encode_image(IMAGES)).sum().backward()
    assert head.weight.grad is not None


TOKENS = torch.zeros(2, dtype=torch.int64)
BAD: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("encode_image", (IMAGES, "mean"), {}, r"output must be one of \['pooled', 'cls', 'tokens'\]"),
    ("encode_image", (IMAGES,), {"batch_size": 0}, "batch_size must be a positive integer"),
    ("encode_image", ("a.jpg",), {}, "image 0 is a str; pass processor"),
    ("encode_image", (IMAGES,), {"processor": 3}, "must be a beit3_fast.Processor, got int"),
    ("encode_image", ([],), {}, "at least one image, got none"),
    ("encode_text", ("a cat",), {}, "texts need a tokenizer; pass processor"),
    ("encode_text", ([],), {}, "at least one"),
    ("encode_text", (None,), {}, "at least one, got a NoneType"),
    ("encode_text", (3,), {}, "got a int"),
    ("encode_text", ([TOKENS.float()],), {}, r"text 0 must be token ids.*got torch.float32"),
    ("encode_text", ([TOKENS, TOKENS[:0]],), {}, r"text 1 must be token ids"),
    ("encode_text", ([TOKENS, "a"],), {}, "texts need a tokenizer"),
    ("encode_text", (TOKENS[None] + 100,), {}, r"\[0, 100\), got ids from 100"),
    ("encode_text", ([TOKENS], "all"), {}, "output must be one of"),
    ("encode_pair", (IMAGES, [TOKENS]), {}, "got 3 images and 1 texts"),
    ("encode_pair", (IMAGES[0], TOKENS[None], "last"), {}, "output must be one of"),
]


@pytest.mark.parametrize(("method", "inputs", "options", "message"), BAD)
def test_bad_input(
    method: str, inputs: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    for name in ("beit3_tiny_patch16_32", "beit3_tiny_patch16_32_retrieval"):
        with pytest.raises(Beit3FastError, match=message):
            getattr(create_model(name), method)(*inputs, **options)


def test_a_branch_that_is_not_there() -> None:
    model = create_model("beit3_tiny_patch16_32", modalities=("text",))
    with pytest.raises(Beit3FastError, match="no vision branch"):
        model.encode_image(IMAGES)
