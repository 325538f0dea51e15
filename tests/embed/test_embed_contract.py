"""embed_dataset met with arguments that it cannot use: one family of errors that say what came, and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from embed_cases import Data

import beit3_fast
from beit3_fast.errors import CheckpointError, ConfigError, InputError
from beit3_fast.model import create_model

OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": torch.nn.Linear(2, 2)}, ConfigError, "a model of create_model, got Linear"),
    ({"model": None}, ConfigError, "a model of create_model, got NoneType"),
    ({"processor": None}, ConfigError, "must be a beit3_fast.Processor, got NoneType"),
    ({"processor": "beit3.spm"}, ConfigError, "got str.*for_model"),
    ({"kind": "video"}, ConfigError, r"kind must be one of .*, got 'video'"),
    ({"kind": ["image"]}, ConfigError, r"got \['image'\]"),
    ({"output": "tokens"}, ConfigError, "output must be one of .*, got 'tokens'"),
    ({"batch_size": 0}, ConfigError, "batch_size must be an integer of at least 1, got 0"),
    ({"batch_size": True}, ConfigError, "got True"),
    ({"shard_size": 2.0}, ConfigError, "shard_size must be an integer of at least 1, got 2.0"),
    ({"workers": -1}, ConfigError, "workers must be an integer of at least 0, got -1"),
    ({"workers": "two"}, ConfigError, "workers .* got 'two'"),
    ({"sources": None}, InputError, "sources must be a path or a list .* got None"),
    ({"sources": []}, InputError, r"at least one.* got \[\]"),
    ({"sources": [3]}, InputError, r"got \[3\]"),
    ({"sources": ""}, InputError, "got ''"),
    ({"sources": "missing"}, InputError, "no file or folder 'missing'"),
    ({"sources": "nul\0byte"}, InputError, "no file or folder"),
    ({"folder": None}, ConfigError, "folder must be a path, got None"),
    ({"folder": 3}, ConfigError, "folder must be a path, got 3"),
    ({"folder": "nul\0byte"}, CheckpointError, "cannot be made"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS)
def test_options(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    model: Any,
    processor: Any,
    data: Data,
    tmp_path: Path,
) -> None:
    arguments = {
        "model": model,
        "sources": data.folder,
        "folder": tmp_path / "out",
        "processor": processor,
    }
    with pytest.raises(error, match=message):
        beit3_fast.embed_dataset(**(arguments | options))
    assert not list(tmp_path.iterdir())


def test_models_and_sources_that_do_not_fit(
    model: Any, processor: Any, data: Data, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    training = create_model("beit3_tiny_patch16_32_retrieval").train()
    with pytest.raises(ConfigError, match=r"model\.eval"):
        beit3_fast.embed_dataset(training, data.folder, out, processor=processor)
    images_only = beit3_fast.Processor.for_model(model)
    with pytest.raises(ConfigError, match="texts need a tokenizer"):
        beit3_fast.embed_dataset(model, data.folder, out, "text", processor=images_only)
    vision = create_model("beit3_tiny_patch16_32", modalities=("vision",))
    with pytest.raises(ConfigError, match="no text branch"):
        beit3_fast.embed_dataset(vision, data.index, out, "text", processor=processor)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    (tmp_path / "empty.jsonl").touch()
    for name, message in (
        ("empty", "has nothing of kind 'image'"),
        ("empty.jsonl", "has nothing of kind 'image'"),
        ("a.tar.gz", "is compressed; unpack it"),
    ):
        with pytest.raises(InputError, match=message):
            beit3_fast.embed_dataset(model, tmp_path / name, out, processor=processor)
    assert not out.exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be made"):
        beit3_fast.embed_dataset(model, data.folder, tmp_path / "file", processor=processor)


def test_a_dataset_without_one_good_item(processor: Any, model: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no tar, but long enough to be tried" * 40)
    (tmp_path / "bad.jpg").write_bytes(b"x")
    for source in ("bad.tar", "bad.jpg"):
        with pytest.raises(InputError, match=r"none of the 1 items could be used; the \.skipped"):
            beit3_fast.embed_dataset(
                model, tmp_path / source, tmp_path / f"o{source}", processor=processor, workers=0
            )
