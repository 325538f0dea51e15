"""The shipped tiles are whole and sound, and a file that is not says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from beit3_fast.kernels import (
    _tiles,
    _weight_gradient,
    expert_linear,
    masked_linear_cross_entropy,
    shared_attention,
)

SHIPPED = _tiles.FOLDER
TILES: dict[str, Any] = {
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


@pytest.mark.parametrize("op", TILES)
def test_the_schema_has_the_fields_of_the_tiles(op: str) -> None:
    tile = TILES[op]
    assert tuple(_tiles.FIELDS[op]) == tile._fields
    assert _tiles.OPTIONAL & set(tile._fields) == set(tile._field_defaults)


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


def test_a_plain_product_of_any_number_of_columns_keeps_a_large_tile() -> None:
    def chosen(features: int, rows: int = 1024) -> str:
        return expert_linear.shape_class(torch.bfloat16, rows, features, 64_010, plain=True)

    assert chosen(768) == "odd columns"
    assert chosen(768, rows=256) == "few rows"
    assert chosen(1001) == "odd sizes"


@pytest.mark.parametrize(
    ("dtype", "features", "out", "expected"),
    [
        (torch.bfloat16, 3072, 768, "weights"),
        (torch.float32, 3072, 768, "fp32 weights"),
        (torch.float16, 588, 1408, "odd weights"),
        (torch.float32, 768, 1003, "fp32 odd weights"),
    ],
)
def test_weights_of_odd_sizes_have_their_own_tile(
    dtype: torch.dtype, features: int, out: int, expected: str
) -> None:
    assert _weight_gradient.shape_class(dtype, features, out) == expected


@pytest.mark.parametrize(
    ("dtype", "width", "longest", "looked_up", "expected"),
    [
        (torch.bfloat16, 64, 197, False, "short"),
        (torch.bfloat16, 64, 197, True, "long"),
        (torch.float16, 88, 197, False, "wide short"),
        (torch.float16, 88, 197, True, "wide long"),
        (torch.bfloat16, 88, 257, False, "wide long"),
        (torch.float32, 64, 577, False, "fp32"),
        (torch.float32, 65, 577, False, "wide fp32"),
        (torch.bfloat16, 64, None, True, "backward"),
        (torch.bfloat16, 88, None, False, "wide backward"),
        (torch.float16, 88, None, True, "wide selected backward"),
        (torch.float32, 88, None, True, "wide fp32 backward"),
    ],
)
def test_wide_heads_have_their_own_tile(
    dtype: torch.dtype, width: int, longest: int | None, looked_up: bool, expected: str
) -> None:
    assert shared_attention.shape_class(dtype, width, longest, looked_up=looked_up) == expected
    assert expected in _tiles.CLASSES["shared_attention"]


Place = tuple[str, ...]
LINEAR: Place = ("tiles", "expert_linear")
FP32, WEIGHTS = (*LINEAR, "fp32"), (*LINEAR, "weights")
SHORT: Place = ("tiles", "shared_attention", "short")
HEAD: Place = ("tiles", "masked_linear_cross_entropy", "16 bits")
BLOCKS = r"one of \[16, 32, 64, 128, 256\]"
# Where something else stands, what, and what the error says.
SPOILED: list[tuple[Place, Any, str]] = [
    ((), [], "the document must be an object, got list"),
    ((), None, "the document must be an object, got NoneType"),
    (("schema",), 2, "schema must be 1, got 2"),
    (("schema",), True, "schema must be 1, got True"),
    (("comment",), "", r"the document must have the keys .* unknown \['comment'\]"),
    (("tiles",), [], "tiles must be an object, got list"),
    (("tiles", "other"), {}, r"tiles must have the keys .* unknown \['other'\], missing \[\]"),
    (LINEAR, [1], "expert_linear must be an object, got list"),
    ((*LINEAR, "huge"), {}, r"expert_linear must have the keys .* unknown \['huge'\]"),
    (FP32, [1], "expert_linear, 'fp32' must be an object, got list"),
    (
        FP32,
        {},
        r"expert_linear, 'fp32' must have .* missing \['block_k', 'block_m', 'block_n', 'gr",
    ),
    ((*WEIGHTS, "block_z"), 64, r"expert_linear, 'weights' must have .* unknown \['block_z'\]"),
    ((*FP32, "block_m"), 48, f"'fp32': block_m must be {BLOCKS}, got 48"),
    ((*FP32, "block_m"), 1, "block_m must be .* got 1"),
    ((*FP32, "block_m"), 1 << 20, "block_m must be .* got 1048576"),
    ((*FP32, "block_m"), True, "block_m must be .* got True"),
    ((*FP32, "block_n"), 64.0, "block_n must be .* got 64.0"),
    ((*FP32, "block_k"), 0, "block_k must be .* got 0"),
    ((*FP32, "num_warps"), 0, r"num_warps must be one of \[1, 2, 4, 8, 16\], got 0"),
    ((*FP32, "num_warps"), 64, "num_warps must be .* got 64"),
    ((*FP32, "num_stages"), 0, "num_stages must be an integer from 1 to 8, got 0"),
    ((*FP32, "num_stages"), "2", "num_stages must be .* got '2'"),
    ((*FP32, "per_sm"), 0, "per_sm must be an integer from 1 to 16, got 0"),
    ((*FP32, "group_m"), 0, "group_m must be an integer from 1 to 64, got 0"),
    ((*FP32, "tma"), 1, r"tma must be one of \[False, True\], got 1"),
    ((*WEIGHTS, "slices"), 0, r"'weights': slices must be one of \[1, 2, 4\], got 0"),
    ((*WEIGHTS, "slices"), 8, "slices must be .* got 8"),
    ((*LINEAR, "many rows", "slices"), 2, "'many rows': slices .* 64 columns wide, got 2 of 256"),
    ((*SHORT, "whole"), 1000, r"'short': whole must be one of \[0, 32, .* 256\], got 1000"),
    ((*SHORT, "whole"), 100, "shared_attention, 'short': whole must be .* got 100"),
    ((*FP32, "num_warps"), 256, "num_warps must be .* got 256"),
    ((*SHORT, "block_q"), -16, f"block_q must be {BLOCKS}, got -16"),
    ((*HEAD, "block_n"), 24, f"entropy, '16 bits': block_n must be {BLOCKS}, got 24"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in the place of the shipped one."""
    monkeypatch.setattr(_tiles, "FOLDER", tmp_path)
    forget()  # what other tests of this process have read
    yield tmp_path
    forget()


def forget() -> None:
    _tiles.read.cache_clear()
    _tiles.choose.cache_clear()


def shipped() -> Any:
    return json.loads((SHIPPED / "sm_90.json").read_text())


def refuse(path: Path, words: str) -> None:
    """The file is refused for a class that may be another one than the spoiled, and the error names it."""
    with pytest.raises(ValueError, match=f"{path.name}: .*{words}"):
        _tiles.choose(TILES["expert_linear"], "expert_linear", "few rows", path.stem)


@pytest.mark.parametrize(("place", "value", "words"), SPOILED)
def test_a_spoiled_file_says_what_is_wrong(
    place: Place, value: Any, words: str, folder: Path
) -> None:
    root = {"document": shipped()}
    own = root
    *before, last = "document", *place
    for key in before:
        own = own[key]
    own[last] = value
    path = folder / "sm_99.json"
    path.write_text(json.dumps(root["document"]))
    refuse(path, words)


@pytest.mark.parametrize(
    ("place", "changes", "words"),
    [
        (
            SHORT,
            {"block_q": 16, "num_warps": 16},
            "num_warps must be at most 8 for 16 x 64, got 16",
        ),
        (
            (*SHORT[:2], "fp32"),
            {"block_k": 16, "num_warps": 16, "block_q": 16},
            "at most 8 for 16 x",
        ),
        (
            (*LINEAR, "many rows"),
            {"num_stages": 8},
            "num_stages 8 in per_sm 1 .* 344064 bytes of the 23",
        ),
        (
            (*LINEAR, "many rows"),
            {"per_sm": 16},
            "num_stages 3 in per_sm 16 .* take fewer, or smaller",
        ),
        (
            (*SHORT[:2], "wide long"),
            {"num_stages": 8, "block_k": 128},
            "458752 bytes of the 233472",
        ),
        ((*FP32,), {"num_stages": 8, "per_sm": 8}, "917504 bytes"),
    ],
)
def test_a_tile_that_no_multiprocessor_can_hold_is_refused(
    place: Place, changes: dict[str, int], words: str, folder: Path
) -> None:
    content = shipped()
    _, op, own_class = place
    content["tiles"][op][own_class] |= changes
    path = folder / "sm_90.json"
    path.write_text(json.dumps(content))
    refuse(path, words)


def test_a_missing_op_is_named(folder: Path) -> None:
    content = shipped()
    del content["tiles"]["shared_attention"]
    path = folder / "sm_99.json"
    path.write_text(json.dumps(content))
    refuse(path, r"tiles must have .* missing \['shared_attention'\]")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{"])
def test_a_file_that_is_no_json_is_named(content: bytes, folder: Path) -> None:
    path = folder / "sm_99.json"
    path.write_bytes(content)
    refuse(path, "it must be JSON in UTF-8, got")


def test_no_descriptors_before_the_unit_that_reads_them(folder: Path) -> None:
    path = folder / "sm_80.json"
    path.write_text(json.dumps(shipped()))
    refuse(path, "'many rows': tma must be false before sm_90")


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
