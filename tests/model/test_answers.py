"""answer, reason and classify against the forwards that they call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import images, padding, task_model, texts

from beit3_fast.errors import Beit3FastError, InputError
from beit3_fast.model import create_model

LENGTHS = [5, 2, 7]
IMAGES, OTHERS, TEXTS = images(3), images(3, seed=8), texts(3, 7)
IDS = [TEXTS[i, :n] for i, n in enumerate(LENGTHS)]
PAD = padding(LENGTHS, 7)
LABELS = [f"answer {i}" for i in range(9)]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@torch.no_grad()
def test_answers(batch_size: int, tmp_path: Path) -> None:
    model = task_model("vqav2", num_classes=9)
    p = model(IMAGES, TEXTS, PAD).sigmoid()
    found = model.answer(IMAGES, IDS, 3, labels=LABELS, batch_size=batch_size)
    for own, row in zip(found, p, strict=True):
        order = row.argsort(descending=True)[:3].tolist()
        assert [guess.class_id for guess in own] == order
        assert [guess.label for guess in own] == [LABELS[i] for i in order]
        assert [guess.score for guess in own] == pytest.approx(row[order].tolist(), abs=1e-5)
    path = tmp_path / "answers.txt"
    path.write_text("\n".join(LABELS))
    assert model.answer(IMAGES, IDS, 3, labels=path, batch_size=batch_size) == found
    nameless = model.answer(IMAGES, IDS, 99, batch_size=batch_size)
    assert [len(own) for own in nameless] == [9] * 3
    assert nameless[0][0].label is None


@torch.no_grad()
def test_one_image_and_many_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = task_model("vqav2", num_classes=9)
    apart = [model.answer(IMAGES[0], own, 2)[0] for own in IDS]
    together = model.answer(IMAGES[0], IDS, 2, batch_size=2)
    for own, other in zip(together, apart, strict=True):
        assert [g.class_id for g in own] == [g.class_id for g in other]
        assert [g.score for g in own] == pytest.approx([g.score for g in other], abs=1e-5)


@torch.no_grad()
def test_an_image_of_many_questions_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from beit3_fast.data import Processor, processor

    calls: list[Any] = []
    real = processor.preprocess_image
    monkeypatch.setattr(
        processor, "preprocess_image", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    model = task_model("vqav2", num_classes=9)
    pixels = torch.randint(0, 255, (3, 40, 40), dtype=torch.uint8)
    model.answer(pixels, IDS, 1, processor=Processor(image_size=32), batch_size=1)
    assert len(calls) == 1


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@torch.no_grad()
def test_reasons(batch_size: int) -> None:
    model = task_model("nlvr2")
    expected = model(IMAGES, OTHERS, TEXTS, PAD).softmax(1)[:, 1].tolist()
    found = model.reason(IMAGES, OTHERS, IDS, batch_size=batch_size)
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(found) - min(found) > 1e-3
    one = model.reason(IMAGES[0], OTHERS[0], IDS, batch_size=batch_size)
    assert one[0] == pytest.approx(expected[0], abs=1e-5)
    assert len(one) == 3
    swapped = model.reason(OTHERS, IMAGES, IDS)
    assert swapped != pytest.approx(expected, abs=1e-4)
    wide = [IMAGES[0], torch.randn(3, 48, 32), IMAGES[2]]
    mixed = model.reason(wide, OTHERS, IDS)
    assert mixed[0] == pytest.approx(expected[0], abs=1e-5)


@torch.no_grad()
def test_classes() -> None:
    model = task_model("imageclassification", num_classes=9)
    mixed = [IMAGES[0], torch.randn(3, 48, 32), IMAGES[1]]
    found = model.classify(mixed, 2, labels=LABELS, batch_size=2)
    for own, image in zip(found, mixed, strict=True):
        p = model(image[None]).softmax(1)[0]
        order = p.argsort(descending=True)[:2].tolist()
        assert [guess.class_id for guess in own] == order
        assert [guess.label for guess in own] == [LABELS[i] for i in order]
        assert [guess.score for guess in own] == pytest.approx(p[order].tolist(), abs=1e-5)


def spoiled(tensor: torch.Tensor, place: int, value: float = float("nan")) -> torch.Tensor:
    out = tensor.clone()
    out[place].view(-1)[7] = value
    return out


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_an_image_that_is_not_finite_has_no_answer(poison: float, batch_size: int) -> None:
    damaged = spoiled(IMAGES, 2, poison)
    answers, reasons = task_model("vqav2", num_classes=9), task_model("nlvr2")
    classes = task_model("imageclassification", num_classes=9)
    with pytest.raises(InputError, match=r"scores of question 2 are not finite.*try bfloat16"):
        answers.answer(damaged, IDS, batch_size=batch_size)
    with pytest.raises(InputError, match="scores of sentence 2 are not finite"):
        reasons.reason(OTHERS, damaged, IDS, batch_size=batch_size)
    with pytest.raises(InputError, match="scores of image 2 are not finite"):
        classes.classify(damaged, batch_size=batch_size)


def test_a_score_of_one_may_be_an_overflow() -> None:
    """The sigmoid of infinity is a number."""
    model = task_model("vqav2", num_classes=9)
    with torch.no_grad():
        model.head[-1].bias[4] = float("inf")
    with pytest.raises(InputError, match="scores of question 0 are not finite"):
        model.answer(IMAGES, IDS)


VQA = "beit3_tiny_patch16_32_vqav2"
NLVR2 = "beit3_tiny_patch16_32_nlvr2"
CLASSES = "beit3_tiny_patch16_32_imageclassification"
BAD: list[tuple[str, str, tuple[Any, ...], dict[str, Any], str]] = [
    (VQA, "answer", (IMAGES, IDS, 0), {}, "top_k must be a positive integer, got 0"),
    (VQA, "answer", (IMAGES, IDS, "5"), {}, "top_k must be a positive integer, got '5'"),
    (VQA, "answer", (IMAGES[:2], IDS), {}, "or all with one, got 2 images and 3 texts"),
    (VQA, "answer", (IMAGES, IDS[0][None]), {}, "got 3 images and 1 texts"),
    (VQA, "answer", (IMAGES, IDS), {"labels": ["a"]}, "3129 classes, got 1 labels"),
    (VQA, "answer", (IMAGES, IDS), {"labels": "missing.txt"}, "missing.txt' cannot be read"),
    (VQA, "answer", (IMAGES, IDS), {"batch_size": 0}, "batch_size must be a positive integer"),
    (VQA, "answer", (IMAGES, "what is it?"), {}, "texts need a tokenizer"),
    (VQA, "answer", ("x.jpg", IDS), {}, "image 0 is a str; pass processor"),
    (VQA, "answer", ([*IMAGES[:2], "x.jpg"], IDS), {"batch_size": 2}, "image 2 is a str"),
    (VQA, "answer", (IMAGES, IDS), {"processor": "x"}, "must be a beit3_fast.Processor"),
    (NLVR2, "reason", (IMAGES, OTHERS[:2], IDS), {}, "got 3 as image_a and 2 as image_b"),
    (NLVR2, "reason", (IMAGES[:2], OTHERS[:2], IDS), {}, "got 2 images and 3 texts"),
    (NLVR2, "reason", ("a.jpg", "b.jpg", IDS), {}, "image 0 is a str"),
    (NLVR2, "reason", (IMAGES, OTHERS, []), {}, "at least one"),
    (NLVR2, "reason", (IMAGES, OTHERS, IDS), {"batch_size": 1.5}, "batch_size must be"),
    (CLASSES, "classify", (IMAGES,), {"labels": ["a"]}, "1000 classes, got 1 labels"),
    (CLASSES, "classify", (IMAGES, -1), {}, "top_k must be"),
    (CLASSES, "classify", ([],), {}, "at least one image"),
    (CLASSES, "classify", (IMAGES,), {"batch_size": None}, "batch_size must be"),
]


@pytest.mark.parametrize(("name", "method", "inputs", "options", "message"), BAD)
def test_bad_input(
    name: str, method: str, inputs: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(Beit3FastError, match=message):
        getattr(create_model(name), method)(*inputs, **options)


def test_reason_needs_false_and_true() -> None:
    with pytest.raises(Beit3FastError, match="two classes false and true, this model has 3"):
        create_model(NLVR2, num_classes=3).reason(IMAGES, OTHERS, IDS)
