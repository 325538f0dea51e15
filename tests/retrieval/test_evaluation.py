"""Recall against a count by hand, and the evaluation that encodes each image once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_fast import evaluate_retrieval
from beit3_fast.errors import Beit3FastError
from beit3_fast.model import create_model
from beit3_fast.retrieval import evaluation, recall


def by_hand(images: Tensor, texts: Tensor, owner: list[int], k: int) -> tuple[float, float]:
    """(TR@k, IR@k), one image and one text after another."""
    scores = (images @ texts.T).tolist()
    found_texts = found_images = 0
    for i, row in enumerate(scores):
        best = sorted(range(len(row)), key=lambda t: -row[t])[:k]
        found_texts += any(owner[t] == i for t in best)
    for t, own in enumerate(owner):
        column = [row[t] for row in scores]
        best = sorted(range(len(column)), key=lambda i: -column[i])[:k]
        found_images += own in best
    return found_texts / len(images), found_images / len(texts)


@pytest.mark.parametrize("at_once", [1 << 24, 70])
def test_by_hand(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 16, generator=generator)
    owner = [0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 9, 11, 11, 3]
    noise = torch.randn(len(owner), 16, generator=generator)
    texts = images[owner] + 1.5 * noise
    found = recall(images, texts, owner)
    shares = []
    for k in (1, 5, 10):
        expected = by_hand(images, texts, owner, k)
        assert (found.text_retrieval[k], found.image_retrieval[k]) == pytest.approx(expected)
        shares += expected
    assert found.mean == pytest.approx(sum(shares) / 6)
    assert 0 < found.text_retrieval[1] < found.text_retrieval[10] < 1
    assert recall(images, texts, torch.tensor(owner), ks=(99,)).image_retrieval == {99: 1.0}


def test_every_image_is_encoded_once(
    model: Any, processor: Any, photos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [
        ["A cat with big green eyes", "a cat", "eyes"],
        ["a cat in the camera"],
        ["A red cup of coffee", "coffee on a table"],
        [],
    ]
    seen: list[int] = []
    forward = model.beit3.forward_packed

    def spy(images: Any, text: Any, **options: Any) -> Any:
        seen.append(0 if images is None else len(images))
        return forward(images, text, **options)

    monkeypatch.setattr(model.beit3, "forward_packed", spy)
    found = evaluate_retrieval(model, photos, captions, processor=processor, batch_size=3)
    assert sum(seen) == 4
    texts = [text for own in captions for text in own]
    embedded = (
        model.encode_image(photos, processor=processor),
        model.encode_text(texts, processor=processor),
    )
    assert found == recall(*embedded, [0, 0, 0, 1, 2, 2])


ROWS = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, r"images must be embeddings \[N, C\].* got NoneType"),
        ({"images": ROWS[:0]}, "at least one"),
        ({"texts": ROWS[0]}, r"texts must be embeddings .* got \[4\]"),
        ({"texts": ROWS[:, :2]}, "one width, got 4 and 2"),
        ({"image_of_text": [0, 1]}, r"int64 \[T\] = \[3\].*\[2\]"),
        ({"image_of_text": [0.0, 1.0, 2.0]}, "got torch.float32"),
        ({"image_of_text": [0, 1, 3]}, "0 to 2, got 0 to 3"),
        ({"image_of_text": [0, -1, 2]}, "0 to 2, got -1 to 2"),
        ({"images": ROWS * torch.inf}, r"images must be finite, 3 of its 3 rows are not"),
        (
            {"texts": torch.cat([ROWS[:2], ROWS[:1] * torch.nan])},
            "texts must be finite, 1 of its 3",
        ),
        ({"texts": ROWS.double() * 1e300}, "texts must be finite"),
        ({"images": ROWS.to(torch.complex64)}, "images must be real numbers, got torch.complex64"),
        ({"image_of_text": ["a", 1, 2]}, r"int64 \[T\] = \[3\], got \['a', 1, 2\]"),
        ({"image_of_text": None}, r"int64 \[T\] = \[3\], got None"),
        ({"ks": 5}, "ks must be positive integers, got 5"),
        ({"ks": ()}, "ks must be positive integers"),
        ({"ks": (0,)}, r"ks must be positive integers, got \(0,\)"),
    ],
)
def test_bad_embeddings(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"images": ROWS, "texts": ROWS, "image_of_text": [0, 1, 2]} | changes
    with pytest.raises(Beit3FastError, match=message):
        recall(**call)


def test_bad_lists(model: Any, processor: Any, photos: Any) -> None:
    for images, captions, message in (
        (photos, "a cat", "captions must be a list of lists"),
        (photos, ["a cat"] * 4, "captions must be a list of lists"),
        (photos, [["a cat"]], "got 4 images and 1 lists"),
        (photos[:1], [[]], "at least one"),
        (photos[:2], [["a"], ["b", " "]], "caption 1 of image 1, ' ', has no words; leave it out"),
        (None, [["a"]], "images must be a list, or one tensor or array of images, got NoneType"),
        ("a", [["a"]], "images must be a list, or one tensor or array of images, got str"),
    ):
        with pytest.raises(Beit3FastError, match=message):
            evaluate_retrieval(model, images, captions, processor=processor)
    with pytest.raises(Beit3FastError, match=r"a retrieval model.*got BEiT3ForCaptioning"):
        evaluate_retrieval(create_model("beit3_tiny_patch16_32_captioning"), photos, [[]] * 4)


def test_autocast_rounds_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 16, generator=generator)
    texts = images + 1.5 * torch.randn(300, 16, generator=generator)
    expected = recall(images, texts, list(range(300)))
    with torch.autocast("cpu", torch.bfloat16):
        assert recall(images, texts, list(range(300))) == expected
