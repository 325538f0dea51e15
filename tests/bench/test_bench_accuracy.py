"""bench/accuracy.py on a tiny model: its table, and that its figures see a difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from beit3_fast.ops import library
from bench import accuracy
from bench.inputs import photo_pieces

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the compiled library")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "MODEL", "beit3_tiny_patch16_32_vqav2")
    monkeypatch.setattr(accuracy, "PIXELS", 32)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(["--samples", "9", "--batch", "4", "--dtypes", "int8", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "int8: 9 of 9" in printed
    assert "| against float32 | int8 | bfloat16 |" in printed
    assert printed.count("\n| ") == 7


def test_figures_of_a_dtype() -> None:
    figures = accuracy.compare("int8", 12, 5)
    assert 0.99 < figures["lowest cosine"] <= figures["1 % of tokens below"] < 1
    assert figures["1 % of tokens below"] <= figures["mean cosine"] < 1
    assert 1e-4 < figures["error of the scores"] < 0.05
    assert figures["same first answer"] <= figures["first answer in fp32's first five"] <= 1


def test_a_wrong_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    build = accuracy.model_in

    def spoiled(dtype: str) -> Any:
        model = build(dtype)
        if dtype == "int8":
            with torch.no_grad():
                model.beit3.text_embed.weight.neg_()
        return model

    monkeypatch.setattr(accuracy, "model_in", spoiled)
    assert accuracy.compare("int8", 4, 4)["lowest cosine"] < 0.9


def test_pieces_follow_from_their_number_alone() -> None:
    a, b = photo_pieces(range(40), 16), photo_pieces([39, 7], 16)
    assert torch.equal(b, a[[39, 7]])
    flat = a.flatten(1)
    assert all(not torch.equal(flat[i], flat[j]) for i in range(40) for j in range(i))


def test_wrong_counts(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--samples", "0"], ["--batch", "0"], ["--dtypes", "int4"]):
        with pytest.raises(SystemExit):
            accuracy.main(arguments)
    assert "at least 1" in capsys.readouterr().err
