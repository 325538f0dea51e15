"""Classes given by words."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import beit3_fast
from beit3_fast.errors import Beit3FastError, InputError
from beit3_fast.model import create_model

LABELS = ["cat", "cup of coffee", "white rocket"]
TEMPLATES = ("a photo of a {}.", "the {} in the camera", "{}")


def test_a_label_is_the_mean_of_its_sentences(model: Any, processor: Any, photos: Any) -> None:
    classify = beit3_fast.zero_shot_classifier(model, LABELS, TEMPLATES, processor=processor)
    for label, weight in zip(LABELS, classify.weights, strict=True):
        sentences = [template.format(label) for template in TEMPLATES]
        mean = model.encode_text(sentences, processor=processor).mean(0)
        assert torch.allclose(weight, F.normalize(mean, dim=0), atol=1e-6)
    assert torch.allclose(classify.weights.norm(dim=1), torch.ones(3))
    embedded = model.encode_image(photos, processor=processor)
    expected = (model.logit_scale.exp() * embedded @ classify.weights.T).softmax(1)
    found = classify(photos, top_k=2)
    for own, p in zip(found, expected, strict=True):
        best = p.argsort(descending=True)[:2]
        assert [guess.label for guess in own] == [LABELS[i] for i in best]
        assert [guess.score for guess in own] == pytest.approx(p[best].tolist(), abs=1e-5)
    assert [len(own) for own in classify(photos[0], top_k=10)] == [3]


def test_braces_of_a_label_are_no_places(model: Any, processor: Any) -> None:
    classify = beit3_fast.zero_shot_classifier(model, ["{0} {x}"], processor=processor)
    assert classify.labels == ("{0} {x}",)


def test_what_is_not_finite_has_no_class(model: Any, processor: Any) -> None:
    classify = beit3_fast.zero_shot_classifier(model, LABELS, processor=processor)
    pixels = torch.zeros(2, 3, 32, 32)
    pixels[1, 0, 5, 5] = float("nan")
    with pytest.raises(InputError, match="scores of image 1 are not finite"):
        classify(pixels)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.language_head.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="scores of label 0 are not finite"):
        beit3_fast.zero_shot_classifier(broken, LABELS, processor=processor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": create_model("beit3_tiny_patch16_32")}, "a retrieval model.*got BEiT3;"),
        ({"model": None}, "a retrieval model.*got NoneType"),
        ({"labels": []}, "labels must be a list of at least one str"),
        ({"labels": "cat"}, "labels must be a list of at least one str, got 'cat'"),
        ({"labels": ["cat", 3]}, "labels must be a list"),
        ({"templates": ()}, "templates must be a list"),
        ({"templates": ["a photo"]}, r"one \{\} for the label.*got 'a photo'"),
        ({"templates": ["{} {}"]}, r"one \{\} for the label"),
        ({"processor": None}, "texts need a tokenizer"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_bad_input(model: Any, processor: Any, changes: dict[str, Any], message: str) -> None:
    options = {"model": model, "labels": LABELS, "processor": processor} | changes
    with pytest.raises(Beit3FastError, match=message):
        beit3_fast.zero_shot_classifier(**options)


def test_bad_images(model: Any, processor: Any, photos: Any) -> None:
    classify = beit3_fast.zero_shot_classifier(model, LABELS, processor=processor)
    for call, message in (
        (lambda: classify([]), "at least one image"),
        (lambda: classify("missing.jpg"), "missing.jpg"),
        (lambda: classify(photos, top_k=0), "top_k must be a positive integer, got 0"),
        (lambda: classify(photos, batch_size=-1), "batch_size must be"),
    ):
        with pytest.raises(Beit3FastError, match=message):
            call()


def test_logits_are_not_rounded_to_the_dtype(model: Any, processor: Any, photos: Any) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        half.logit_scale.fill_(math.log(100))
    logits = beit3_fast.zero_shot_classifier(half, LABELS, processor=processor).logits(photos)
    weights = F.normalize(
        half.encode_text([f"a photo of a {name}." for name in LABELS], processor=processor).double()
    )
    scale = half.logit_scale.double().exp()
    expected = scale * half.encode_image(photos, processor=processor).double() @ weights.T
    assert torch.allclose(logits.double(), expected, atol=1e-4)
