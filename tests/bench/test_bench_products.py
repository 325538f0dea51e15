"""The products are compared with the released procedures before they are timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import products

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
