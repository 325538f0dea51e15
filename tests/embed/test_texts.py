"""Texts that are empty or long."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import beit3_fast


@pytest.mark.parametrize("workers", [0, 1])
def test_empty_and_long_texts(
    workers: int, model: Any, processor: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = {"a": "a cup", "b": " \n", "c": "cup " * 100, "d": "table " * 100, "e": ""}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    with caplog.at_level(logging.WARNING, "beit3_fast"):
        report = beit3_fast.embed_dataset(
            model, tmp_path, tmp_path / "out", "text", processor=processor, workers=workers
        )
    assert (report.embedded, report.skipped, report.unread) == (3, 2, 0)
    listed = (tmp_path / "out" / "000000.skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in listed] == ["the text has no words"] * 2
    cut = [r.getMessage() for r in caplog.records if "texts cut" in r.getMessage()]
    expected = f"texts cut behind 64 tokens: 2, the first of them that of {tmp_path / 'c.txt'}"
    assert cut == [expected]
