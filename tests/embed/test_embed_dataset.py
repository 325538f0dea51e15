"""embed_dataset: the rows of encode_*, whatever holds the data; what is bad is left out, named and counted."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from embed_cases import CAPTIONS, Data
from torch import Tensor

import beit3_fast
from beit3_fast.data import segments
from beit3_fast.embed import EmbedReport, work
from beit3_fast.embed.decode import Decoder
from beit3_fast.embed.sources import Blob, list_items
from beit3_fast.embed.work import encode
from beit3_fast.errors import InputError
from beit3_fast.retrieval import EmbeddingIndex


@pytest.fixture
def embed(model: Any, processor: Any, tmp_path: Path) -> Any:
    def call(sources: Any, *arguments: Any, **options: Any) -> EmbedReport:
        options = {"processor": processor, "workers": 0, "batch_size": 2, "shard_size": 4} | options
        return beit3_fast.embed_dataset(model, sources, tmp_path / "out", *arguments, **options)

    return call


def contents(report: EmbedReport) -> tuple[Tensor, list[str]]:
    shards = [EmbeddingIndex.load(path, "torch") for path in report.shards]
    assert report.embedded == sum(map(len, shards))
    return torch.cat([shard.embeddings for shard in shards]), [
        name for shard in shards for name in shard.names
    ]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def photos(data: Data) -> list[str]:
    return [str(data.folder / f"{number}.png") for number in range(len(CAPTIONS))]


@pytest.mark.parametrize("form", ["folder", "tar", "index", "files"])
def test_images(form: str, embed: Any, model: Any, processor: Any, data: Data) -> None:
    source = photos(data) if form == "files" else getattr(data, form)
    report = embed(source)
    rows, names = contents(report)
    # an index names an image once for each caption; it is embedded once
    assert [Path(name).name for name in names] == [f"{n}.png" for n in range(len(CAPTIONS))]
    assert (report.embedded, report.resumed) == (6, 0)
    assert report.skipped == (form in ("folder", "tar"))
    close(rows, model.encode_image(photos(data), processor=processor))


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_texts_and_pairs(form: str, embed: Any, model: Any, processor: Any, data: Data) -> None:
    rows, names = contents(embed(getattr(data, form), "text"))
    assert [Path(name).name for name in names][-1] == "bad.txt"
    close(rows, model.encode_text([*CAPTIONS, "a bad one"], processor=processor))


@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize("output", ["pooled", "cls"])
def test_pairs(form: str, output: str, embed: Any, model: Any, processor: Any, data: Data) -> None:
    report = embed(getattr(data, form), "pair", output)
    assert report.skipped == 1
    expected = model.encode_pair(photos(data), CAPTIONS, output, processor=processor)
    close(contents(report)[0], expected)


def test_the_texts_of_an_index_are_token_ids(
    embed: Any, model: Any, processor: Any, data: Data
) -> None:
    rows, names = contents(embed(data.index, "text"))
    assert names == [f"{data.index}#{line}" for line in range(1, 13)]
    ids = [json.loads(line)["text_segment"] for line in data.index.read_text().splitlines()]
    close(rows, model.encode_text(segments(ids, padding=False)["text_tokens"]))


def test_texts_of_one_length_share_a_batch(
    embed: Any, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[list[int]] = []

    def noted(*arguments: Any) -> Tensor:
        lengths.append([len(ids) for ids in arguments[-1]])
        return encode(*arguments)

    monkeypatch.setattr(work, "encode", noted)
    embed(data.index, "text", shard_size=12)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted([4] * 6 + list(range(3, 9)))
    assert [len(batch) for batch in lengths] == [2] * 6


def test_a_tar_that_was_cut_behind_its_list(
    model: Any, processor: Any, data: Data, tmp_path: Path
) -> None:
    path = tmp_path / "a.tar"
    shutil.copy(data.tar, path)
    items = list_items(path, "text")
    places = list(range(len(items)))
    decoder = Decoder(items, processor, model.config.vocab_size)
    assert decoder.__getitems__(places).skipped == []
    blob = items[-1].text
    assert isinstance(blob, Blob)
    assert blob.offset is not None
    os.truncate(path, blob.offset + blob.size - 1)
    (left_out,) = decoder.__getitems__(places).skipped
    assert left_out.place == places[-1]
    assert "ends too early" in left_out.reason
    assert not left_out.may_pass


def test_what_is_bad_is_named(
    embed: Any, data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = tmp_path / "bad.jsonl"
    photo = str(data.folder / "0.png")
    lines = [
        json.dumps({"image_path": photo, "text_segment": [5]}),
        "not json",
        json.dumps({"image_path": photo}),
        json.dumps({"image_path": photo, "text_segment": [100]}),
        json.dumps({"image_path": "missing.jpg", "text_segment": [5]}),
        json.dumps({"image_path": 3, "text_segment": [5]}),
        json.dumps({"image_path": photo, "image2_path": photo, "text_segment": [5]}),
        json.dumps([photo]),
        json.dumps({"image_path": photo, "text_segment": "a cat"}),
    ]
    index.write_text("\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING, "beit3_fast"):
        report = embed(index, "pair", shard_size=100)
    assert contents(report)[1] == [f"{index}#1", f"{index}#9"]
    assert (report.embedded, report.skipped) == (2, 7)
    listed = (tmp_path / "out" / "000000.skipped.jsonl").read_text().splitlines()
    reasons = [json.loads(line) for line in listed]
    assert [entry["name"] for entry in reasons] == [f"{index}#{n}" for n in range(2, 9)]
    for entry, words in zip(
        reasons,
        (
            "line cannot be used",
            "text_segment",
            "below",
            "missing.jpg",
            "image_path",
            "two",
            "object",
        ),
        strict=True,
    ):
        assert words in entry["reason"]
        assert f"skipped {entry['name']}: {entry['reason']}" in caplog.text


@pytest.mark.parametrize("cut", ["truncated", "header"])
def test_a_damaged_tar_gives_what_it_has(cut: str, embed: Any, data: Data, tmp_path: Path) -> None:
    with tarfile.open(data.tar) as tar:
        third = [member for member in tar if member.name.endswith(".png")][2]
    damaged = bytearray(data.tar.read_bytes())
    if cut == "truncated":
        del damaged[third.offset_data + third.size // 2 :]
    else:
        damaged[third.offset : third.offset + 512] = b"x" * 512
    path = tmp_path / "damaged.tar"
    path.write_bytes(damaged)
    report = embed(path, shard_size=100)
    assert [Path(name).name for name in contents(report)[1]] == ["0.png", "1.png"]
    text = (tmp_path / "out" / "000000.skipped.jsonl").read_text()
    assert "damaged" in text
    assert report.skipped == (2 if cut == "truncated" else 1)


def skipped(folder: Path) -> dict[str, str]:
    """Reasons by names, relative to ``folder``, of all shards."""
    lists = sorted((folder / "out").glob("*.skipped.jsonl"))
    entries = [json.loads(line) for path in lists for line in path.read_text().splitlines()]
    return {str(Path(entry["name"]).relative_to(folder)): entry["reason"] for entry in entries}


def relative(report: EmbedReport, folder: Path) -> list[str]:
    return [str(Path(name).relative_to(folder)) for name in contents(report)[1]]


@pytest.mark.timeout(60)
def test_links_and_what_is_no_file_in_a_folder(
    embed: Any, data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, pool = tmp_path / "folder", tmp_path / "pool"
    folder.mkdir()
    pool.mkdir()
    for name in ("1", "2"):
        shutil.copy(data.folder / f"{name}.png", pool)
        shutil.copy(data.folder / f"{name}.txt", pool)
    (folder / "pool").symlink_to(pool)
    (folder / "same pool").symlink_to(pool)
    (pool / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    for pipe in ("pipe.png", "pipe.txt", "pipe.tar"):
        os.mkfifo(folder / pipe)
    report = embed(folder)
    assert relative(report, tmp_path) == ["folder/pool/1.png", "folder/pool/2.png"]
    found = skipped(tmp_path)
    assert sorted(found) == ["folder/gone.png", "folder/pipe.png", "folder/pipe.tar"]
    assert all("no regular file, or a link that leads nowhere" in why for why in found.values())
    for again in ("same pool", "pool/loop"):
        assert f"left out {folder / again}: another path led to this folder" in caplog.text
    shutil.rmtree(tmp_path / "out")
    assert relative(embed(folder, "text"), tmp_path) == ["folder/pool/1.txt", "folder/pool/2.txt"]
    assert sorted(skipped(tmp_path)) == ["folder/pipe.tar", "folder/pipe.txt"]
    shutil.rmtree(tmp_path / "out")
    assert embed(folder, "pair").embedded == 2
    assert sorted(skipped(tmp_path)) == ["folder/gone.png", "folder/pipe.png", "folder/pipe.tar"]


def test_an_image_with_two_texts(embed: Any, data: Data, tmp_path: Path) -> None:
    """Neither is left out in silence: webdataset's 1.en.txt and 1.txt, and suffixes in two cases."""
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        photo = sorted(Path(data.folder).rglob("*.png"))[0]
        for name in ("1.png", "2.png"):
            tar.add(photo, name)
        for name in ("1.en.txt", "1.txt", "2.txt"):
            (tmp_path / name).write_text("a cup")
            tar.add(tmp_path / name, name)
    assert embed(tmp_path / "two.tar", "pair").embedded == 1
    (why,) = skipped(tmp_path).values()
    assert "1.en.txt and " in why
    assert "leave one of them" in why


def test_a_folder_that_cannot_be_read(
    embed: Any, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(data.folder, photos)
    (photos / "closed").mkdir()
    scandir = os.scandir

    # the tests may run as root, who may read everything
    def refused(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert embed(photos).embedded == 6
    assert "Permission denied" in skipped(tmp_path)["photos/closed"]


def test_links_in_a_tar_and_tars_behind_one_another(embed: Any, data: Data, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(data.folder / "0.png", "0.png")
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.png"
            tar.addfile(member)
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.add(data.folder / "1.png", "1.png")
    path.write_bytes(path.read_bytes() + (tmp_path / "b.tar").read_bytes())
    report = embed(path)
    assert relative(report, tmp_path) == ["a.tar/0.png"]
    found = skipped(tmp_path)
    assert sorted(found) == ["a.tar", "a.tar/hard.png", "a.tar/soft.png"]
    assert "a link to '0.png'" in found["a.tar/hard.png"]
    assert "another tar perhaps, and is not read" in found["a.tar"]


def test_one_row_a_file(
    embed: Any, data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(data.folder, photos)
    shutil.copy(data.index, tmp_path)
    (photos / "alias.png").symlink_to("0.png")
    (photos / "0.txt").rename(photos / "z.txt")
    once = contents(embed(photos))[1]
    assert len(once) == 6
    assert "left out of" in caplog.text
    for sources in (
        [photos, photos],
        [photos, photos / "..", photos / "3.png"],
        [photos, tmp_path / data.index.name],
    ):
        shutil.rmtree(tmp_path / "out")
        caplog.clear()
        report = embed(sources)
        assert contents(report)[1] == once, sources
        assert report.skipped == 1
        assert f"left out of {sources[1]}: " in caplog.text
        assert "items that were listed before, the first of them" in caplog.text
    # every line of an index is a text of its own, once
    shutil.rmtree(tmp_path / "out")
    index = tmp_path / data.index.name
    assert embed([index, photos / ".." / index.name], "text").embedded == 12


def test_the_later_of_two_members_of_one_name_counts(
    embed: Any, data: Data, model: Any, processor: Any, tmp_path: Path, caplog: Any
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number, name in ((0, "a.png"), (1, "b.png"), (2, "a.png")):
            tar.add(data.folder / f"{number}.png", name)
    rows, names = contents(embed(path))
    assert names == [f"{path}/a.png", f"{path}/b.png"]
    photos = [data.folder / f"{number}.png" for number in (2, 1)]
    close(rows, model.encode_image(photos, processor=processor))
    assert f"left out of {path}: 1 members that have the name of a later one" in caplog.text


def test_hidden_members_of_a_tar_are_left_out(
    embed: Any, data: Data, tmp_path: Path, caplog: Any
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.png", "._a.png", "b/.c.png", "b/c.png"):
            tar.add(data.folder / "0.png", name)
    assert contents(embed(path))[1] == [f"{path}/a.png", f"{path}/b/c.png"]
    assert f"left out of {path}: 2 members that begin with a dot, the first of them" in caplog.text


@pytest.mark.parametrize("source", ["a" * 300, f"b/{'a' * 300}.tar", "a\0.png"])
def test_names_that_no_file_can_have(embed: Any, source: str) -> None:
    with pytest.raises(InputError, match="there is no file or folder"):
        embed(source)


def test_workers_change_nothing(embed: Any, data: Data, tmp_path: Path) -> None:
    alone, _ = contents(embed([data.folder, data.tar]))
    (tmp_path / "out").rename(tmp_path / "alone")
    report = embed([data.folder, data.tar], workers=2)
    assert torch.equal(contents(report)[0], alone)
    assert report.embedded == 12


def test_embeddings_that_are_not_finite_are_left_out(
    embed: Any, data: Data, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = type(model).encode_image

    def broken(self: Any, images: Tensor, *arguments: Any, **options: Any) -> Tensor:
        rows: Tensor = encode(self, images, *arguments, **options)
        return rows.index_fill(0, torch.tensor([1]), float("nan")) if len(rows) == 2 else rows

    monkeypatch.setattr(type(model), "encode_image", broken)
    report = embed(photos(data))
    assert (report.embedded, report.skipped) == (3, 3)
    assert [Path(name).stem for name in contents(report)[1]] == ["0", "2", "4"]
