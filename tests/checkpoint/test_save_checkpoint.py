"""Files are whole or not there; both forms round-trip bit for bit and are what other programs read."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import SMALL_BASE, Standin, layout, same, torch_file, weights
from torch import Tensor

from beit3_fast.checkpoint import (
    atomic,
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
    model = Standin(layout("retrieval", SMALL_BASE, (2, 2)))
    model.name, model.config, model.preset = "tiny", SIZES["tiny"], "square"  # type: ignore[assignment]
    found = read_checkpoint(save_checkpoint(model, tmp_path / name))
    assert (found.name, found.config, found.preset) == (
        "tiny",
        json.loads(json.dumps(SIZES["tiny"].to_dict())),
        "square",
    )
    assert same(found.state, model.state_dict())
    found = read_checkpoint(save_checkpoint(model, tmp_path / name, name="other", preset={"a": 1}))
    assert (found.name, found.preset) == ("other", {"a": 1})


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


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("x.onnx", "must end in one of .safetensors, .pth"),
        ("x", "must end in one of"),
        ("nowhere/x.pth", "does not exist"),
        ("folder.pth", "no regular file"),
    ],
)
def test_places_that_cannot_be_written_to(where: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(CheckpointError, match=message) as caught:
        save_checkpoint({"a": torch.ones(1)}, tmp_path / where)
    assert str(tmp_path / where) in str(caught.value)


@pytest.mark.parametrize("name", FORMS)
def test_a_folder_that_is_not_ours(name: str) -> None:
    place = Path("/sys") if os.geteuid() == 0 else Path("/")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*what was there before"):
        save_checkpoint({"a": torch.ones(1)}, place / name)


@pytest.mark.parametrize("name", FORMS)
def test_a_full_disk_leaves_the_old_file(name: str, tmp_path: Path) -> None:
    path = save_checkpoint({"old": torch.ones(4)}, tmp_path / name)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(CheckpointError, match=r"File too large \(make room"):
            save_checkpoint({f"new{i}": torch.ones(100_000) for i in range(20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace", "listdir"])
@pytest.mark.parametrize("name", FORMS)
def test_any_failing_call_leaves_the_old_file(
    name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint({"old": torch.ones(4)}, tmp_path / name)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=r"No space left on device \(make room"):
            save_checkpoint({"new": torch.ones(4)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_data_reaches_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for call in ("fsync", "replace"):
        real = getattr(os, call)

        def spy(*arguments: Any, real: Any = real, call: str = call) -> Any:
            calls.append(call)
            return real(*arguments)

        monkeypatch.setattr(os, call, spy)
    save_checkpoint({"a": torch.ones(4)}, tmp_path / "x.pth")
    assert calls == ["fsync", "replace", "fsync"]


def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint({"old": torch.ones(4)}, tmp_path / "x.pth")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"new": torch.ones(4)}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert set(read_checkpoint(path).state) == {"old"}


def test_links_and_permissions_are_kept(tmp_path: Path) -> None:
    real = save_checkpoint({"old": torch.ones(4)}, tmp_path / "real.pth")
    assert stat.S_IMODE(real.stat().st_mode) == 0o666 & ~current_umask()
    real.chmod(0o640)
    link = tmp_path / "link.pth"
    link.symlink_to(real)
    save_checkpoint({"new": torch.ones(4)}, link)
    assert link.is_symlink()
    assert set(read_checkpoint(real).state) == {"new"}
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    dead = tmp_path / f".x.pth.0123456789ab{atomic._SUFFIX}"
    alive = tmp_path / f".x.pth.ba9876543210{atomic._SUFFIX}"
    others = [tmp_path / f".y.pth.0123456789ab{atomic._SUFFIX}", tmp_path / ".x.pth.mine"]
    for file in (dead, alive, *others):
        file.write_bytes(b"partial")
    with alive.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        save_checkpoint({"a": torch.ones(1)}, path)
    assert set(tmp_path.iterdir()) == {path, alive, *others}
    save_checkpoint({"a": torch.ones(1)}, path)
    assert set(tmp_path.iterdir()) == {path, *others}


def test_two_writers_of_one_file_do_not_sweep_each_other(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with atomic.replacing(path) as file:
        file.write(b"first to begin, last to end")
        save_checkpoint({"a": torch.ones(1)}, path)
        assert set(read_checkpoint(path).state) == {"a"}
    assert path.read_bytes() == b"first to begin, last to end"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import json, os, random, signal, sys, time
import torch
from beit3_fast.checkpoint import read_checkpoint, save_checkpoint

path, rounds = sys.argv[1], int(sys.argv[2])
generator = random.Random(4)
states = [{f"t{i}": torch.full((100_000,), float(k)) for i in range(20)} for k in (1, 2)]
save_checkpoint(states[0], path)
seen, partial = [], 0
for _ in range(rounds):
    child = os.fork()
    if not child:
        while True:
            for state in states[::-1]:
                save_checkpoint(state, path)
    time.sleep(generator.uniform(0.0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    partial += len(os.listdir(os.path.dirname(path))) - 1
    found = read_checkpoint(path).state
    assert all(t.shape == (100_000,) and bool((t == found["t0"][0]).all()) for t in found.values())
    seen.append(float(found["t0"][0]))
save_checkpoint(states[0], path)
print(json.dumps({"seen": seen, "partial": partial, "left": os.listdir(os.path.dirname(path))}))
"""


@pytest.mark.parametrize("name", FORMS)
def test_a_killed_save_leaves_a_whole_file(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / name), "12"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["seen"]) <= {1.0, 2.0}
    assert report["partial"] > 0, "no process was killed while it was writing"
    assert report["left"] == [name]
