"""Files, tokenizers and processors met with what they cannot use: one family of errors that say what came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import beit3_fast
from beit3_fast.errors import (
    CheckpointError,
    ConfigError,
    InputError,
)
from beit3_fast.model import create_model

TINY = "beit3_tiny_patch16_32"
NOT_MODELS: tuple[Any, ...] = (None, 3, "model", {}, [], object(), torch.zeros(2), nn.Linear)

PATHS: tuple[Any, ...] = (None, 3, 1.5, [], object(), torch.zeros(2), b"x.pth")


@pytest.mark.parametrize("value", PATHS, ids=lambda v: type(v).__name__)
def test_paths_that_are_no_paths(value: Any) -> None:
    model = create_model(TINY)
    for call in (
        lambda: beit3_fast.load_checkpoint(model, value),
        lambda: beit3_fast.save_checkpoint(model, value),
    ):
        with pytest.raises((CheckpointError, TypeError), match=r"expected|needs|argument|must"):
            call()


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    model = create_model(TINY)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    for path in (
        tmp_path,
        tmp_path / "missing.pth",
        tmp_path / "empty.pth",
        tmp_path / "text.safetensors",
        tmp_path / "folder" / "x.pth",
        "",
    ):
        with pytest.raises(CheckpointError):
            beit3_fast.load_checkpoint(model, path)
        with pytest.raises(CheckpointError):
            create_model(TINY, checkpoint=path)
    for path in (tmp_path, tmp_path / "x", tmp_path / "x.zip", tmp_path / "folder" / "x.pth"):
        with pytest.raises(CheckpointError, match=str(path)):
            beit3_fast.save_checkpoint(model, path)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("value", NOT_MODELS, ids=lambda v: type(v).__name__)
def test_saving_what_is_not_a_model(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        beit3_fast.save_checkpoint(value, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


TOKENIZERS: tuple[Any, ...] = ("", "missing.spm", b"", b"no model", 3, 1.5, {}, [])


@pytest.mark.parametrize("value", TOKENIZERS, ids=lambda v: repr(v)[:20])
def test_tokenizer_files(value: Any) -> None:
    for make in (beit3_fast.Tokenizer, beit3_fast.Processor):
        with pytest.raises((InputError, TypeError), match=r"expected|argument|cannot|must|not a"):
            make(value)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "round"},
        {"preset": 3},
        {"image_size": 0},
        {"image_size": -32},
        {"image_size": (32,)},
        {"image_size": "large"},
        {"max_length": 0},
        {"max_length": 2.5},
        {"padding": "left"},
        {"padding": None},
    ],
    ids=str,
)
def test_processor_options(options: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, InputError), match="got"):
        beit3_fast.Processor(**options)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (None, None),
        ([], None),
        (3, None),
        ("missing.jpg", None),
        (b"not an image", None),
        ([torch.zeros(2)], None),
        (torch.zeros(3, 0, 5), None),
        (None, "no tokenizer"),
    ],
)
def test_processor_inputs(images: Any, text: Any) -> None:
    with pytest.raises((InputError, ConfigError)):
        beit3_fast.Processor()(images, text)
