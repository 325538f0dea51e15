"""The products are compared with the released procedures before they are timed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import products

pytest.importorskip("skimage")
pytest.importorskip("torchscale")

TINY = ["--size", "tiny", "--pixels", "32", "--rounds", "1", "--dtype", "float32"]
CALLS = {
    "caption": ["caption", "--batch", "3", "--tokens", "4"],
    "retrieval": ["retrieval", "--images", "4", "--batch", "6"],
}


@pytest.mark.parametrize("product", CALLS)
def test_a_report(product: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert products.main([*CALLS[product], *TINY, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["product"].startswith(f"{product}/tiny/32")
    assert report["speed_up"]["p50"] > 0
    assert products.main([*CALLS[product], *TINY]) == 0
    assert "x as fast" in capsys.readouterr().out


@pytest.mark.parametrize("product", CALLS)
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
