"""Files are whole or not there, whatever ends a save."""

from __future__ import annotations

import errno
import fcntl
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

from beit3_fast.checkpoint import (
    atomic,
    read_checkpoint,
    save_checkpoint,
)
from beit3_fast.errors import CheckpointError

FORMS = ("x.safetensors", "x.pth")


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
