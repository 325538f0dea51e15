"""Every example runs on real photographs and says what it promises."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from products import ANSWERS, Shop

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


def arguments(shop: Shop) -> dict[str, list[str]]:
    cat, coffee, china = shop.photos
    start = {
        task: [shop.name(task), shop.checkpoint(task)]
        for task in ("captioning", "vqav2", "nlvr2", "imageclassification", "retrieval")
    }
    search = [*start["retrieval"], shop.tokenizer]
    return {
        "caption": [*start["captioning"], shop.tokenizer, cat, coffee],
        "answer": [*start["vqav2"], shop.tokenizer, shop.answers, cat, "What animal is this?", "?"],
        "reason": [*start["nlvr2"], shop.tokenizer, cat, china, "Both show an animal."],
        "classify": [*start["imageclassification"], cat, coffee],
        "zero_shot": [*search, coffee, "cat", "red cup"],
        "search": [*search, str(shop.folder / "photos.index"), "a red cup", cat, coffee, china],
        "embed_dataset": [*search[:2], str(shop.folder / "embeddings"), cat, coffee, china],
        "export": [*search[:2], str(shop.folder / "tower.pt2")],
        "embed": [*search, coffee, "a red cup of coffee"],
    }


EXPECTED = {
    "caption": ["chelsea.png: ", "coffee.png: "],
    "answer": ["What animal is this? | ", "? | "],
    "reason": ["Both show an animal."],
    "classify": ["chelsea.png | class ", "coffee.png | class "],
    "zero_shot": ["  cat", "  red cup"],
    "search": ["chelsea.png", "china.jpg", "text found: {1: ", "image found: {1: "],
    "embed_dataset": ["3 embeddings, 0 skipped", "chelsea.png is most like "],
    "export": ["tower.pt2: 5 images in, [5, 64] out, largest difference "],
    "embed": ["cosine: ", "class token: [1, 64]", "rows of the pair: ["],
}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(
    name: str, shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments(shop)[name]])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    for words in EXPECTED[name]:
        assert words in out
    if name == "export":
        assert float(out.split()[-1]) < 1e-5
    if name == "answer":
        assert any(answer in out for answer in ANSWERS)


def test_examples_are_short_and_say_how_they_are_called() -> None:
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 40, path
        assert f"python examples/{path.name} MODEL CHECKPOINT" in text
