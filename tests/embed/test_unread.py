"""Items that the system did not give, which are no worse for it, are tried again by the same call."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from embed_cases import Data

import beit3_fast
from beit3_fast.data import images
from beit3_fast.embed import EmbedReport, decode, load_embeddings, work
from beit3_fast.errors import InputError


@pytest.fixture
def embed(model: Any, processor: Any, tmp_path: Path) -> Any:
    def call(sources: Any, kind: str = "image", **options: Any) -> EmbedReport:
        options = {"processor": processor, "workers": 0, "shard_size": 4} | options
        return beit3_fast.embed_dataset(model, sources, tmp_path / "out", kind, **options)

    return call


def photos(data: Data) -> list[str]:
    return [str(data.folder / f"{number}.png") for number in range(6)]


def failing(name: str, error: Exception) -> Callable[..., Any]:
    """``open``, which fails for one file."""

    def opened(path: Any, *arguments: Any, **options: Any) -> Any:
        if os.fspath(path).endswith(name):
            raise error
        return open(path, *arguments, **options)

    return opened


def written(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.name: (path.read_bytes(), path.stat().st_ino)
        for path in sorted((folder / "out").iterdir())
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_the_disk_gives_the_second_time(
    workers: int, embed: Any, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = photos(data)
    with monkeypatch.context() as patch:
        fault = OSError(errno.EIO, "Input/output error")
        patch.setattr(images, "open", failing("2.png", fault), raising=False)
        report = embed(sources, workers=workers)
    assert (report.embedded, report.skipped, report.unread) == (5, 1, 1)
    (listed,) = (tmp_path / "out" / "000000.skipped.jsonl").read_text().splitlines()
    assert "Input/output error; the disk failed, try again" in json.loads(listed)["reason"]
    assert load_embeddings(tmp_path / "out").names == sources[:2] + sources[3:]
    before = written(tmp_path)

    report = embed(sources, workers=workers)
    assert (report.embedded, report.skipped, report.unread, report.resumed) == (6, 0, 0, 5)
    assert load_embeddings(tmp_path / "out").names == sources
    after = written(tmp_path)
    assert after["000001.safetensors"] == before["000001.safetensors"]
    assert "000000.skipped.jsonl" not in after
    assert embed(sources, workers=workers).resumed == 6


@pytest.mark.parametrize(
    ("fault", "again"),
    [
        (OSError(errno.EMFILE, "Too many open files"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (OSError("broken data stream"), False),
        # what a damaged JPEG 2000 gives
        (OSError(errno.EINVAL, "Invalid argument"), False),
    ],
)
def test_which_faults_may_pass(
    fault: OSError, again: bool, embed: Any, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "open", failing("2.png", fault), raising=False)
    report = embed(photos(data))
    assert (report.skipped, report.unread) == (1, int(again))


def test_memory_that_was_short_while_an_image_was_decoded(
    embed: Any, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(images, "_upright", short)
        with pytest.raises(beit3_fast.errors.InputError, match="none of the 6 items"):
            embed(photos(data))
    (reason, *_) = (tmp_path / "out" / "000000.skipped.jsonl").read_text().splitlines()
    assert "needs more memory than there is" in reason
    report = embed(photos(data))
    assert (report.embedded, report.resumed) == (6, 0)


def test_a_text_of_a_tar(embed: Any, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fault = OSError(errno.EIO, "Input/output error")
        patch.setattr(decode, "open", failing(".tar", fault), raising=False)
        with pytest.raises(beit3_fast.errors.InputError, match="none of the"):
            embed(data.tar, "text")
    report = embed(data.tar, "text")
    assert (report.skipped, report.unread) == (0, 0)


def test_a_worse_disk_takes_nothing_away(
    embed: Any, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was embedded stays, whatever cannot be read later; what is left is embedded when it can be."""
    sources, fault = photos(data), OSError(errno.EIO, "Input/output error")
    whole = embed(sources, shard_size=6)
    expected = load_embeddings(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert whole.embedded == 6
    encoded: list[int] = []
    real = work.encode

    def counted(*arguments: Any) -> Any:
        rows = real(*arguments)
        encoded.append(len(rows))
        return rows

    monkeypatch.setattr(work, "encode", counted)
    for name, embedded in (("2.png", 5), (".png", 5), ("nothing", 6)):
        encoded.clear()
        with monkeypatch.context() as patch:
            patch.setattr(images, "open", failing(name, fault), raising=False)
            report = embed(sources, shard_size=6)
        assert (report.embedded, report.unread) == (embedded, 6 - embedded)
        assert len(load_embeddings(tmp_path / "out")) == embedded
    assert sum(encoded) == 1
    found = load_embeddings(tmp_path / "out")
    assert found.names == expected.names
    torch.testing.assert_close(found.embeddings, expected.embeddings, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["safetensors", "parquet"])
def test_rows_are_kept_in_either_form(
    form: str, embed: Any, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    with monkeypatch.context() as patch:
        fault = OSError(errno.EIO, "Input/output error")
        patch.setattr(images, "open", failing("2.png", fault), raising=False)
        embed(photos(data), format=form)
    report = embed(photos(data), format=form)
    assert (report.embedded, report.unread, report.resumed) == (6, 0, 5)


def test_a_shard_that_is_damaged_is_made_from_the_beginning(
    embed: Any, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fault = OSError(errno.EIO, "Input/output error")
        patch.setattr(images, "open", failing("2.png", fault), raising=False)
        embed(photos(data))
    shard = tmp_path / "out" / "000000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert embed(photos(data)).embedded == 6
    assert load_embeddings(tmp_path / "out").names == photos(data)


def test_a_system_that_fails_while_it_lists_ends_the_job_before_it_begins(
    embed: Any, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a list would be another job than the whole one."""
    with monkeypatch.context() as patch:

        def fails(*_: Any, **__: Any) -> Any:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(tarfile, "open", fails)
        with pytest.raises(InputError, match=r"cannot be listed \(Input/output error; the disk"):
            embed(data.folder.parent)
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_not_tried_again(embed: Any, data: Data, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    whole = (data.folder / "0.png").read_bytes()
    (folder / "a.png").write_bytes(whole)
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    report = embed(folder)
    assert (report.embedded, report.skipped, report.unread) == (1, 1, 0)
    assert embed(folder).resumed == 2
