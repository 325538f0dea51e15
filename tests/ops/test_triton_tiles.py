"""The shipped tiles are whole and sound, and a file that is not says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from beit3_fast.kernels import (
    _tiles,
    expert_linear,
    masked_linear_cross_entropy,
    shared_attention,
)

TILES = {
    "expert_linear": expert_linear.Tile,
    "shared_attention": shared_attention.Tile,
    "masked_linear_cross_entropy": masked_linear_cross_entropy.Tile,
}


@pytest.mark.parametrize("name", _tiles.ARCHITECTURES)
def test_every_class_has_a_tile(name: str) -> None:
    for op, classes in _tiles.CLASSES.items():
        for shape_class in classes:
            tile = _tiles.choose(TILES[op], op, shape_class, name)
            assert min(tile[:2]) >= 16
    assert {path.stem for path in _tiles.FOLDER.glob("*.json")} == set(_tiles.ARCHITECTURES)


@pytest.mark.parametrize(
    ("features", "out", "shape_class"),
    [
        (768, 3072, "many rows"),
        (588, 1408, "odd sizes"),
        (768, 1003, "odd sizes"),
        (1001, 1003, "odd sizes"),
    ],
)
def test_sizes_that_16_does_not_divide_have_their_own_tile(
    features: int, out: int, shape_class: str
) -> None:
    assert expert_linear.shape_class(torch.bfloat16, 1024, features, out) == shape_class
    assert expert_linear.shape_class(torch.float32, 1024, features, out) == "fp32"


def test_a_plain_product_of_any_number_of_columns_keeps_the_large_tile() -> None:
    def chosen(features: int) -> str:
        return expert_linear.shape_class(torch.bfloat16, 1024, features, 64_010, plain=True)

    assert chosen(768) == "many rows"
    assert chosen(1001) == "odd sizes"


def spoil_schema(content: Any) -> None:
    content["schema"] = 2


def spoil_op(content: Any) -> None:
    del content["tiles"]["shared_attention"]


def spoil_class(content: Any) -> None:
    content["tiles"]["expert_linear"]["huge"] = {}


def spoil_number(content: Any) -> None:
    content["tiles"]["expert_linear"]["fp32"]["block_m"] = 48


def spoil_key(content: Any) -> None:
    content["tiles"]["expert_linear"]["fp32"]["block_z"] = 64


def spoil_slices(content: Any) -> None:
    content["tiles"]["expert_linear"]["many rows"]["slices"] = 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_schema, "schema must be 1"),
        (spoil_op, "the ops"),
        (spoil_class, "huge"),
        (spoil_number, "power of two"),
        (spoil_key, "block_z"),
        (spoil_slices, "64 columns wide, got 2 of 256"),
    ],
)
def test_a_spoiled_file_says_what_is_wrong(
    spoil: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((_tiles.FOLDER / "sm_90.json").read_text())
    spoil(content)
    (tmp_path / "sm_77.json").write_text(json.dumps(content))
    monkeypatch.setattr(_tiles, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=words):
        _tiles.choose(TILES["expert_linear"], "expert_linear", "fp32", "sm_77")
    _tiles.read.cache_clear()
    _tiles.choose.cache_clear()


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),
    ],
)
def test_every_gpu_has_a_file(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    _tiles.architecture.cache_clear()
    assert _tiles.architecture(torch.device("cuda", 0)) == name
    _tiles.architecture.cache_clear()
