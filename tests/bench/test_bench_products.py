"""The products are compared with the released procedures before they are timed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import products
from bench.inputs import photo_batch
from bench.official_captioning import official_captions, official_score

pytest.importorskip("skimage")
pytest.importorskip("torchscale")

TINY = ["--size", "tiny", "--pixels", "32", "--rounds", "1", "--dtype", "float32"]
CALLS = {
    "caption": ["caption", "--batch", "3", "--tokens", "4"],
    "retrieval": ["retrieval", "--images", "4", "--batch", "6"],
    "embed": ["embed", "--images", "5", "--batch", "2", "--workers", "0"],
}


@pytest.mark.parametrize("product", CALLS)
def test_a_report(product: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert products.main([*CALLS[product], *TINY, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["product"].startswith(f"{product}/tiny/32")
    assert report["speed_up"]["p50"] > 0
    assert ("of_floor" in report) == (product == "caption")
    assert products.main([*CALLS[product], *TINY]) == 0
    assert "x as fast as the " in capsys.readouterr().out


def captions_of_both(dtype: torch.dtype) -> tuple[Any, Tensor, int, list[tuple[Any, Any]]]:
    """The released model, images, the mask token, and (our caption, the released one) of each image."""
    ours, official = products.models("captioning", "tiny", 32, dtype)
    images, mask = photo_batch([0, 1, 2], 32).to(dtype), ours.config.vocab_size - 9
    mine = ours.caption(images, 3, 8, mask_id=mask, compat=True)
    theirs = official_captions(official, images, mask, 3, 8)
    return official, images, mask, [(a[0], b[0]) for a, b in zip(mine, theirs, strict=True)]


def test_the_score_of_given_words_is_that_of_the_search() -> None:
    official, images, mask, pairs = captions_of_both(torch.float32)
    for image, (_, caption) in zip(images, pairs, strict=True):
        score = official_score(official, image[None], mask, caption.tokens)
        assert score == pytest.approx(caption.score, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captions_are_judged_by_their_scores(dtype: torch.dtype) -> None:
    official, images, mask, pairs = captions_of_both(dtype)
    assert products.worse_captions(official, images, mask, pairs) == ""
    ours, theirs = pairs[1]
    other = next(word for word in range(10, 20) if word != ours.tokens[2])
    words = (*ours.tokens[:2], other, *ours.tokens[3:])
    score = official_score(official, images[1:2], mask, words)
    for wrong in (
        dataclasses.replace(ours, score=ours.score * 1.2),
        dataclasses.replace(ours, tokens=words, score=score),
    ):
        found = products.worse_captions(
            official, images, mask, [pairs[0], (wrong, theirs), pairs[2]]
        )
        assert found == "captions [1] are worse than the released ones"


def test_no_speed_where_files_are_not_embedded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = products.photo_files

    def damaged(folder: Path, count: int) -> None:
        real(folder, count)
        (folder / "00001.jpg").write_bytes(b"no image")

    monkeypatch.setattr(products, "photo_files", damaged)
    assert products.main([*CALLS["embed"], *TINY]) == 1
    assert "4 of 5 files were embedded; no speed" in capsys.readouterr().err


def test_the_quick_form_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def product(arguments: Any) -> Any:
        seen.append(arguments)
        return products.Product("x", int, int, lambda a, b: "", "nothing")

    monkeypatch.setitem(products.PRODUCTS, "embed", product)
    assert products.main(["embed", "--quick", "--rounds", "9"]) == 0
    assert products.main(["embed"]) == 0
    quick, usual = seen
    assert (quick.rounds, quick.pixels, quick.images, quick.batch) == (1, 224, 16, 2)
    assert (usual.rounds, usual.pixels, usual.images, usual.batch) == (3, 384, 500, 8)


@pytest.mark.parametrize("product", ["caption", "retrieval"])
def test_no_speed_where_results_differ(
    product: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = products.models

    def other(*arguments: Any) -> tuple[Any, Any]:
        ours, official = real(*arguments)
        for parameter in official.parameters():
            parameter.data = parameter.data.flip(0)
        return ours, official

    monkeypatch.setattr(products, "models", other)
    assert products.main([*CALLS[product], *TINY]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no speed is reported" in captured.err
