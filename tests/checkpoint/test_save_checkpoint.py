"""Both forms round-trip bit for bit and are what other programs read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import SHAPES, Standin, same, torch_file, weights
from torch import Tensor

from beit3_fast.checkpoint import (
    convert_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from beit3_fast.config import SIZES
from beit3_fast.data.presets import ImagePreset
from beit3_fast.errors import CheckpointError

FORMS = ("x.safetensors", "x.pth")
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
)


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"x.pth"


def every_kind_of_tensor() -> dict[str, Tensor]:
    """Odd sizes in all dtypes, so that alignment matters; special values; views and shared memory."""
    generator = torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = {}
    for dtype in DTYPES:
        raw = torch.randint(0, 2, (7 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        state[f"kind.{dtype}"] = raw.view(dtype)
        state[f"scalar.{dtype}"] = raw.view(dtype)[0]
        state[f"none.{dtype}"] = torch.empty(0, 3, dtype=dtype)
    state["special"] = torch.tensor([float("nan"), -float("inf"), -0.0, 1e-45])
    block = torch.randn(6, 4, generator=generator)
    state["q"], state["k"], state["v"] = block.chunk(3)
    state["transposed"] = block.t()
    state["strided"] = block[::2, 1]
    state["tied"] = state["again"] = torch.randn(3)
    state["same memory, other dtype"] = block.view(torch.int32)
    state["broadcast"] = torch.tensor([5.0]).expand(2, 3)
    state["名前.weight"] = torch.ones(2)
    return state


@pytest.mark.parametrize("name", FORMS)
def test_every_bit_comes_back(name: str, tmp_path: Path) -> None:
    state = every_kind_of_tensor()
    path = save_checkpoint(state, tmp_path / name)
    found = read_checkpoint(path)
    assert list(found.state) == list(state)
    assert same(found.state, state)
    assert list(tmp_path.iterdir()) == [path]


def test_conversion_round_trips_and_is_reproducible(tmp_path: Path) -> None:
    state = every_kind_of_tensor()
    first = torch_file(
        tmp_path / "official.pth", {"model": {n: t.clone() for n, t in state.items()}, "epoch": 3}
    )
    done = convert_checkpoint(first, tmp_path / "a.safetensors")
    assert (done.tensors, done.left_out) == (len(state), ("epoch",))
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.pth")
    convert_checkpoint(tmp_path / "b.pth", tmp_path / "c.safetensors")
    for file in ("a.safetensors", "b.pth", "c.safetensors"):
        assert same(read_checkpoint(tmp_path / file).state, state)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    assert set(torch.load(tmp_path / "b.pth", weights_only=True)) == {"model"}


def test_conversion_refuses_to_overwrite(tmp_path: Path) -> None:
    a = save_checkpoint(weights({"a": (2,)}), tmp_path / "a.pth")
    b = save_checkpoint(weights({"b": (2,)}), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="exists already"):
        convert_checkpoint(a, b)
    assert set(read_checkpoint(b).state) == {"b"}
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert_checkpoint(a, tmp_path / "." / "a.pth", overwrite=True)
    convert_checkpoint(a, b, overwrite=True)
    assert set(read_checkpoint(b).state) == {"a"}


def test_conversion_notices_a_disk_that_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beit3_fast.checkpoint import convert

    a = save_checkpoint({"a": torch.zeros(2)}, tmp_path / "a.pth")

    def lying(state: Any, path: Path, **options: Any) -> None:
        save_checkpoint({"a": -torch.zeros(2)}, path, **options)

    monkeypatch.setattr(convert, "save_checkpoint", lying)
    with pytest.raises(CheckpointError, match="does not read back"):
        convert_checkpoint(a, tmp_path / "b.safetensors")


def test_conversion_for_a_model_keeps_its_configuration(tmp_path: Path) -> None:
    import beit3_fast

    model = beit3_fast.create_model("beit3_tiny_patch16_32_vqav2", num_classes=7)
    source = torch_file(tmp_path / "x.pth", {"model": model.state_dict()})
    target = tmp_path / "x.safetensors"
    convert_checkpoint(source, target, model=model, preset=ImagePreset.get("imagenet"))
    found = read_checkpoint(target)
    assert found.name == "beit3_tiny_patch16_32_vqav2"
    assert found.config is not None
    assert type(model.config).from_dict(found.config) == model.config
    assert ImagePreset.get(found.preset) == ImagePreset.get("imagenet")
    assert load_checkpoint(model, target).preset == found.preset
    # what the file says comes before what the model would, and that before nothing
    convert_checkpoint(target, tmp_path / "y.pth", model=model)
    assert read_checkpoint(tmp_path / "y.pth").preset == found.preset
    convert_checkpoint(source, tmp_path / "z.safetensors", model=model)
    assert read_checkpoint(tmp_path / "z.safetensors").preset == model.preset
    other = beit3_fast.create_model("beit3_tiny_patch16_32_vqav2", num_classes=7, img_size=64)
    with pytest.raises(CheckpointError, match="2x2 patches and the named model for 4x4"):
        convert_checkpoint(source, target, model=other, overwrite=True)
    with pytest.raises(CheckpointError, match="missing"):
        convert_checkpoint(
            source,
            target,
            model=beit3_fast.create_model("beit3_tiny_patch16_32_nlvr2"),
            overwrite=True,
        )
    assert same(read_checkpoint(target).state, found.state)


@pytest.mark.parametrize("name", FORMS)
def test_a_model_brings_its_own_description(name: str, tmp_path: Path) -> None:
    model = Standin(SHAPES)
    model.name, model.config, model.preset = "tiny", SIZES["tiny"], "square"  # type: ignore[assignment]
    found = read_checkpoint(save_checkpoint(model, tmp_path / name))
    assert (found.name, found.config, found.preset) == (
        "tiny",
        json.loads(json.dumps(SIZES["tiny"].to_dict())),
        "square",
    )
    assert same(found.state, model.state_dict())
    own = {"mean": [0, 0, 0]}
    found = read_checkpoint(save_checkpoint(model, tmp_path / name, name="other", preset=own))
    assert (found.name, found.preset) == ("other", own)


def test_the_official_loader_reads_our_pth(tmp_path: Path) -> None:
    state = weights({"beit3.a": (3,)})
    content = torch.load(save_checkpoint(state, tmp_path / "x.pth", name="m"), weights_only=True)
    # as the official loader does: the first of 'model|module' that is there
    found = next(content[key] for key in ("model", "module") if key in content)
    assert same(found, state)


def test_the_safetensors_library_and_ours_read_each_other(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    state = {n: t.contiguous().clone() for n, t in every_kind_of_tensor().items()}
    path = save_checkpoint(state, tmp_path / "ours.safetensors", name="m", config={"a": 1})
    assert same(load_file(path), state)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["model"] == "m"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            # readers map the file into memory: every tensor has to begin where its dtype allows
            assert entry["data_offsets"][0] % state[name].dtype.itemsize == 0, name
    data = raw[8 + length :]
    assert metadata["sha256"] == hashlib.sha256(data).hexdigest()
    theirs = tmp_path / "theirs.safetensors"
    save_file(state, theirs, metadata={"format": "pt"})
    found = read_checkpoint(theirs)
    assert same(found.state, state)
    assert any("no digest" in remark for remark in found.remarks)


def test_verification_can_be_skipped(tmp_path: Path) -> None:
    for name in FORMS:
        path = save_checkpoint({"a": torch.zeros(64)}, tmp_path / name)
        raw = path.read_bytes()
        path.write_bytes(raw.replace(bytes(256), bytes(255) + b"\x01"))
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(path)
        assert read_checkpoint(path, verify=False).state["a"].count_nonzero() == 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no tensors to save"),
        ({"a": 1}, "is a int"),
        ({"a": torch.ones(2).to_sparse()}, "sparse_coo tensor"),
        ({"a": torch.ones(2, device="meta")}, "meta device"),
        ({1: torch.ones(2)}, "cannot be the name"),
        ({"__metadata__": torch.ones(2)}, "cannot be the name"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "no name for torch.complex64"),
    ],
)
def test_what_cannot_be_saved(state: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint({"good": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        save_checkpoint(state, path)
    assert str(caught.value).startswith(str(path))
    assert set(read_checkpoint(path).state) == {"good"}
    assert list(tmp_path.iterdir()) == [path]


def test_descriptions_that_are_no_json(tmp_path: Path) -> None:
    for bad in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(CheckpointError, match="config cannot be written as JSON"):
            save_checkpoint({"a": torch.ones(1)}, tmp_path / "x.pth", config=bad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"name": 5}, "'model': 5"),
        ({"metadata": {1: "a"}}, "must be texts under names, got 1"),
        ({"metadata": {"a": None}}, "must be texts under names"),
        ({"metadata": ["a"]}, "must be a dictionary of texts, got list"),
        ({"metadata": {"a": "\ud800"}}, "UTF-8"),
        ({"metadata": {"sha256": "0"}}, "written by itself"),
        ({"metadata": {"config": "{"}}, "no valid JSON"),
        ({"config": 5}, "no table of values"),
        ({"preset": "nonsense"}, "image preset in the metadata is none"),
        ({"preset": {"std": [0, 0, 0]}}, "std must be positive"),
        ({"preset": 5}, "image preset in the metadata is none"),
    ],
)
def test_what_the_reader_would_refuse_is_not_written(
    description: dict[str, Any], message: str, form: str, tmp_path: Path
) -> None:
    path = save_checkpoint({"good": torch.ones(2)}, tmp_path / form)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint({"a": torch.ones(1)}, path, **description)
    assert set(read_checkpoint(path).state) == {"good"}


@pytest.mark.parametrize("path", [None, 5, b"x.pth", "", "a\0.pth", "\ud800.pth", BytesPath()])
def test_what_can_be_the_name_of_no_file(path: Any) -> None:
    for call in (
        lambda: save_checkpoint({"a": torch.ones(1)}, path),
        lambda: read_checkpoint(path),
        lambda: convert_checkpoint(path, "x.pth"),
        lambda: convert_checkpoint("x.pth", path),
    ):
        with pytest.raises(
            CheckpointError, match=r"expected the path|cannot be the name of a file"
        ):
            call()
