"""The folder of a world holds what was asked for and nothing else, whatever happened there before."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3_fast import cli
from beit3_fast.data.index_files import read_index
from beit3_fast.data.world import WorldSize, digits, files, write_digits, write_world
from beit3_fast.errors import ConfigError, InputError

SIZE = WorldSize(train=3, val=2, test=2, texts=4, pixels=32)
MORE = WorldSize(train=6, val=2, test=2, texts=4, pixels=32, labelled=4)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(write_world(tmp_path_factory.mktemp("small"), SIZE, seed=6))


def test_a_killed_command_leaves_nothing_to_the_next_world(
    small: dict[str, bytes], tmp_path: Path
) -> None:
    root = tmp_path / "world"
    call = [sys.executable, "-m", "beit3_fast", "world", str(root), "--scenes", "20000"]
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("000009.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.rglob("000009.png")), "it was drawing"
    assert not root.exists()
    write_world(root, SIZE, seed=6)
    assert content(root) == small
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_world_that_cannot_be_finished(
    error: Any, small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "deep/world"

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, "_compared", fail)
        with pytest.raises((KeyboardInterrupt, ConfigError)) as raised:
            write_world(root, MORE)
    if isinstance(error, OSError):
        assert "cannot be written (No space left on device)" in str(raised.value)
    assert not list(root.parent.iterdir())
    assert content(write_world(root, SIZE, seed=6)) == small


def test_files_of_others_are_left_alone(small: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "notes"
    root.mkdir()
    root.chmod(0o750)
    (root / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds no finished world, but mine\.txt; give a folder"):
        write_world(root, SIZE)
    with pytest.raises(ConfigError, match=r"mine\.txt is a file; give a folder"):
        write_world(root / "mine.txt", SIZE)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_world(root / "mine.txt/world", SIZE)
    assert content(root) == {"mine.txt": b"mine"}
    (root / "mine.txt").unlink()
    (tmp_path / "link").symlink_to("notes")
    write_world(tmp_path / "link", SIZE, seed=6)
    assert content(root) == small
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE(root.stat().st_mode) == 0o750
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "notes"]


def test_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is where you are; give a folder in it"):
        write_world(".", SIZE)


def test_another_process_that_draws(tmp_path: Path) -> None:
    partial = tmp_path / ".world.beit3-fast-partial"
    partial.mkdir()
    (partial / "theirs").touch()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process draws into"):
        write_world(tmp_path / "world", SIZE)
    os.close(descriptor)
    assert (partial / "theirs").exists()


@pytest.mark.parametrize("damaged", ['{"form', "", "\udcff"])
def test_a_damaged_mark(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "world.json").write_bytes(damaged.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"world\.json cannot be read .*delete the folder, or"):
        write_world(tmp_path, SIZE)


@pytest.mark.parametrize("seed", [-1, 1.0, True, "a"])
def test_seeds_that_are_none(seed: Any, tmp_path: Path) -> None:
    for write in (
        lambda: write_world(tmp_path / "world", SIZE, seed=seed),
        lambda: write_digits(tmp_path, 32, seed=seed),
    ):
        with pytest.raises(ConfigError, match=rf"seed must be an integer .* 0, got {seed!r}"):
            write()
    assert not (tmp_path / "world").exists()


def test_pixels_that_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pixels in (0, 23, 48.0, "48"):
        for write in (lambda: WorldSize(pixels=pixels), lambda: write_digits(tmp_path, pixels)):  # type: ignore[arg-type]  # noqa: B023
            with pytest.raises(ConfigError, match="pixels must be an integer of at least 24, got"):
                write()
    assert cli.main(["world", str(tmp_path / "w"), "--seed", "-1"]) == 1
    assert "seed must be an integer of at least 0, got -1" in capsys.readouterr().err


def test_killed_digits_leave_no_index_of_others(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "world.spm").write_bytes(small["world.spm"])
    real = digits._load()
    monkeypatch.setattr(digits, "HELD_OUT", 3)
    monkeypatch.setattr(digits, "_load", lambda: (real[0][:9], real[1][:9]))
    write_digits(tmp_path, 32, seed=1)
    names = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    assert len(names) == 5

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            write_digits(tmp_path, 32, seed=2)
    assert not list(tmp_path.glob("*.jsonl"))
    write_digits(tmp_path, 32, seed=2)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == names


def test_captioning_files_without_texts_are_images(small: dict[str, bytes], tmp_path: Path) -> None:
    for split, images in (("train", 6), ("val", 2)):
        path = tmp_path / f"coco_captioning.{split}.jsonl"
        path.write_bytes(small[path.name])
        assert len(read_index(path, "image")) == images
    assert len(read_index(tmp_path / "coco_captioning.train.jsonl", "pair")) == 6
    with pytest.raises(InputError, match=r"line 1 of .*its text_segment is null, as in official"):
        read_index(tmp_path / "coco_captioning.val.jsonl", "pair")
