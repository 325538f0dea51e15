"""Codes on the disk: those of the tokenizer, whole or continued, and what masked data modelling takes from them."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from held_elsewhere import held_elsewhere
from test_continuation import at_call, child
from tokenizer_runs import PIXELS, teach, tokenizer
from train_cases import data

from beit3_fast.checkpoint import read_checkpoint, save_checkpoint
from beit3_fast.data import Augment
from beit3_fast.data.image_files import list_images
from beit3_fast.data.mixed import Mix
from beit3_fast.errors import CheckpointError, ConfigError, InputError
from beit3_fast.model.visual_tokenizer import VisualTokenizer, create_visual_tokenizer
from beit3_fast.train import tokenize_images as jobs
from beit3_fast.train.tokenize_images import TokenizeReport, tokenize_images
from beit3_fast.train.visual_tokens import CodeFile, VisualTokens


@pytest.fixture(scope="module")
def taught(world: Path, tmp_path_factory: pytest.TempPathFactory) -> VisualTokenizer:
    folder = tmp_path_factory.mktemp("taught")
    teach(world, folder)
    return create_visual_tokenizer(checkpoint=folder / "model.safetensors")


def make(own: VisualTokenizer, sources: Any, out: Path, **options: Any) -> TokenizeReport:
    return tokenize_images(own, sources, out, progress=False, **{"batch_size": 3, **options})


def filled(seed: int) -> VisualTokenizer:
    """Another tokenizer, whose codebook has seen noise."""
    own = tokenizer(seed).train()
    own(torch.randn(2, 3, PIXELS, PIXELS))
    return own.eval()


def test_the_codes_of_a_folder(taught: VisualTokenizer, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "codes.safetensors"
    report = make(taught, world / "images", out)
    paths = list_images(world / "images")
    assert report == TokenizeReport(len(paths), 0, 0, report.used)
    read = CodeFile.load(out)
    assert read.codes.dtype == torch.int16
    assert read.codes.shape == (len(paths), 36)
    assert (read.num_codes, read.grid_size, read.preset) == (24, (6, 6), "square")
    assert report.used == read.codes.unique().numel() > 2
    pixels = torch.stack([jobs._Images(paths, PIXELS, "square")[n] for n in (0, 7)])  # type: ignore[misc]
    expected = taught.tokenize(pixels)
    assert torch.equal(torch.stack([read.of_file(paths[n]) for n in (0, 7)]), expected)
    assert read.identity == VisualTokens(taught).identity
    assert not list(tmp_path.glob(".*partial*"))
    with pytest.raises(InputError, match=r"has no codes of 'elsewhere\.png'; run beit3-fast tok"):
        read.of_file("elsewhere.png")


def test_more_codes_than_int16_has(world: Path, tmp_path: Path) -> None:
    own, out = tokenizer(num_codes=70_000), tmp_path / "codes.safetensors"
    own.quantize.embedding.weight.copy_(F.normalize(torch.randn(70_000, 8), dim=1))
    own.quantize.embedding.initted.fill_(1.0)
    make(own, world / "images/val", out)
    read = CodeFile.load(out)
    assert read.codes.dtype == torch.int32
    assert int(read.codes.max()) > 2**15
    paths = list_images(world / "images/val")
    pixels = torch.stack([jobs._Images(paths, PIXELS, "square")[n] for n in range(len(paths))])  # type: ignore[misc]
    assert torch.equal(read.codes.long(), own.tokenize(pixels))


def test_a_killed_job_goes_on(
    taught: VisualTokenizer, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    make(taught, world / "images", whole)
    with monkeypatch.context() as patch:

        def work() -> None:
            at_call(jobs._Job, "add", 4, patch)
            make(taught, world / "images", out)

        assert child(work) == signal.SIGKILL
    assert not out.exists()
    begun = tmp_path / ".out.safetensors.partial/codes.bin"
    with begun.open("ab") as file:
        file.write(b"half a row")
    with begun.open("rb+") as file:
        file.truncate(len(list_images(world / "images")) * 72 + 72)
    with pytest.raises(
        CheckpointError, match=r"has codes of 19 images, expected at most 18; remove"
    ):
        make(taught, world / "images", out)
    with begun.open("rb+") as file:
        file.truncate(9 * 72 + 10)
    with pytest.raises(ConfigError, match="the beginning of another job"):
        make(filled(3), world / "images", out)
    with pytest.raises(ConfigError, match="the beginning of another job"):
        make(taught, world / "images/val", out)
    assert make(taught, world / "images", out, batch_size=4, workers=1).resumed == 9
    assert out.read_bytes() == whole.read_bytes()
    assert not begun.parent.exists()


def test_one_process_at_a_time(taught: VisualTokenizer, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / ".out.safetensors.partial"
    folder.mkdir()
    with (
        held_elsewhere(folder),
        pytest.raises(CheckpointError, match="another process writes to"),
    ):
        make(taught, world / "images/val", tmp_path / "out.safetensors")
    assert make(taught, world / "images/val", tmp_path / "out.safetensors").resumed == 0


def test_a_finished_file_is_left_as_it_is(
    taught: VisualTokenizer, world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.safetensors"
    first = make(taught, world / "images/val", out)
    before = out.stat().st_mtime_ns
    again = make(taught, world / "images/val", out)
    assert (again.images, again.resumed, again.used) == (first.images, first.images, first.used)
    assert out.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="holds codes of another tokenizer; give"):
        make(filled(3), world / "images/val", out)
    with pytest.raises(ConfigError, match="holds codes of other images, or of im"):
        make(taught, world / "images", out)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("changed", ["size", "time", "gone"])
def test_images_that_changed_under_their_names(
    changed: str,
    finished: bool,
    taught: VisualTokenizer,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(world / "images/val", tmp_path / "images")
    image, out = tmp_path / "images/000002.png", tmp_path / "codes.safetensors"
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(jobs._Job, "finish", lambda *_: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            make(taught, tmp_path / "images/000002.png", out)
    time = image.stat().st_mtime_ns
    if changed == "size":
        shutil.copy(world / "images/train/000003.png", image)
        os.utime(image, ns=(time, time))
    elif changed == "time":
        os.utime(image, ns=(time, time + 1))
    else:
        image.unlink()
    said = (
        "codes of other images, or of images changed"
        if finished
        else "another job, with .* images changed"
    )
    with pytest.raises(ConfigError, match=f"{said}.*size and time of the last change.* remove it"):
        make(taught, image, out)


def test_pretraining_notices_an_image_that_changed(
    taught: VisualTokenizer, world: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image.png"
    shutil.copy(world / "images/val/000002.png", image)
    make(taught, image, tmp_path / "codes.safetensors")
    codes = CodeFile.load(tmp_path / "codes.safetensors")
    os.utime(image, ns=(0, 0))
    assert codes.of_file(str(image)).shape == (36,)
    with image.open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=r"image\.png' had \d+ bytes when .*, now it has .*; run"):
        codes.of_file(str(image))


def test_codes_move_with_their_images(taught: VisualTokenizer, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "images/val", tmp_path / "here/images")
    make(taught, tmp_path / "here/images", tmp_path / "here/codes.safetensors")
    shutil.copytree(tmp_path / "here", tmp_path / "there/deeper")
    shutil.rmtree(tmp_path / "here")
    codes = CodeFile.load(tmp_path / "there/deeper/codes.safetensors")
    images = list_images(tmp_path / "there/deeper/images")
    assert torch.equal(torch.stack([codes.of_file(image) for image in images]), codes.codes.long())
    out = tmp_path / "there/deeper/codes.safetensors"
    assert make(taught, tmp_path / "there/deeper/images", out).resumed == len(images)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda own: own.quantize.embedding.initted.zero_(), "codebook was never filled"),
        (lambda own: own.quantize.embedding.weight.zero_(), "codebook was never filled"),
        (
            lambda own: own.quantize.embedding.weight[1, 0].fill_(torch.nan),
            r"finite.*dding\.weight",
        ),
        (
            lambda own: own.encode_task_layer[2].weight[0, 0].fill_(torch.inf),
            r"finite.*ayer\.2\.we",
        ),
        (
            lambda own: own.encoder.pos_embed[0, 0, 0].fill_(torch.nan),
            r"finite.*encoder\.pos_embed",
        ),
    ],
)
def test_a_tokenizer_that_knows_no_codes(
    spoil: Any, message: str, taught: VisualTokenizer, world: Path, tmp_path: Path
) -> None:
    own = copy.deepcopy(taught)
    with torch.no_grad():
        spoil(own)
    with pytest.raises(CheckpointError, match=message):
        make(own, world / "images/val", tmp_path / "codes.safetensors")
    with pytest.raises(CheckpointError, match=message):
        VisualTokens(own)
    assert not list(tmp_path.iterdir())


def test_images_that_cannot_be_read(
    taught: VisualTokenizer, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(world / "images/val", tmp_path / "images")
    good = list_images(tmp_path / "images")
    for name in ("000001_broken.png", "000004_broken.png"):
        (tmp_path / "images" / name).write_bytes(b"no picture")
    out = tmp_path / "codes.safetensors"
    report = make(taught, tmp_path / "images", out)
    assert (report.images, report.skipped) == (len(good), 2)
    for name in ("000001_broken.png", "000004_broken.png"):
        assert f"skipped {tmp_path / 'images' / name}: " in caplog.text
    read = CodeFile.load(out)
    assert int(read.codes.min()) >= 0
    make(taught, good, tmp_path / "good.safetensors")
    alone = CodeFile.load(tmp_path / "good.safetensors")
    assert all(torch.equal(read.of_file(image), alone.of_file(image)) for image in good)
    assert make(taught, tmp_path / "images", out) == replace(report, resumed=len(good) + 2)
    os.rename(tmp_path / "images", tmp_path / "moved")
    with pytest.raises(InputError, match="none of the 1 images can be used"):
        make(taught, tmp_path / "moved/000001_broken.png", tmp_path / "none.safetensors")
    assert not list(tmp_path.glob(".*partial")), "nothing keeps the next call from other images"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no image files"):
        make(taught, tmp_path / "empty", tmp_path / "none.safetensors")


def test_files_that_are_no_codes(taught: VisualTokenizer, world: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        CodeFile.load(tmp_path / "nothing.safetensors")
    save_checkpoint(taught, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no codes; beit3-fast tokenize-images makes"):
        CodeFile.load(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"written to a \.safetensors file, got"):
        make(taught, world / "images", tmp_path / "codes.bin")
    for sources, into in ((5, "a.safetensors"), ([5], "a.safetensors"), (world, None)):
        with pytest.raises((ConfigError, InputError), match=r"expected .* got (5|\[5\]|None)"):
            make(taught, sources, into)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a VisualTokenizer, got str"):
        VisualTokens("vqkd.pth")  # type: ignore[arg-type]
    for name, value in (("batch_size", 0), ("batch_size", "8"), ("workers", -1), ("workers", 1.0)):
        with pytest.raises(ConfigError, match=f"{name} must be an integer of at least .*got"):
            make(taught, world / "images", tmp_path / "codes.safetensors", **{name: value})


NONE = torch.zeros(0, dtype=torch.int16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": None}, "lacks 'codes'"),
        ({"images": None}, "lacks 'images'"),
        ({"sizes": None}, "lacks 'sizes'"),
        ({"facts": None}, "lacks 'facts'"),
        ({"images": b"[1"}, "cannot be read"),
        ({"images": b"\xff"}, "cannot be read"),
        ({"images": b"[" * 100_000}, "cannot be read"),
        ({"images": b'{"a": 1}'}, "images must be names"),
        ({"images": b"[]", "codes": NONE}, "images must be names, at least one"),
        (
            {"images": b'["a.png"]'},
            r"codes must be .* \[1, 36\], got torch.int16 of shape \[6, 36\]",
        ),
        ({"codes": lambda codes: codes[:3]}, r"codes must be int16 or int32 of shape \[6, 36\]"),
        (
            {"codes": lambda codes: codes[:, :9]},
            r"codes must be .*got torch.int16 of shape \[6, 9\]",
        ),
        ({"codes": lambda codes: codes.float()}, r"codes must be .*got torch.float32"),
        ({"codes": lambda codes: codes + 24}, "codes must be from 0 to 23, got"),
        ({"codes": lambda codes: codes - 24}, "codes must be from 0 to 23, got -"),
        ({"sizes": lambda sizes: sizes[1:]}, r"sizes must be int64 of shape \[6\], got"),
        ({"num_codes": "24"}, "num_codes must be a positive integer, got '24'"),
        ({"num_codes": 0}, "num_codes must be a positive integer, got 0"),
        ({"grid_size": [6]}, r"grid_size must be two positive integers, got \[6\]"),
        ({"grid_size": [-6, -6]}, "grid_size must be two positive integers"),
        ({"grid_size": 6}, "tables cannot be read"),
        ({"preset": ["square"]}, "preset must be one of"),
        ({"preset": "round"}, r"preset must be one of .*, got 'round'"),
        ({"tokenizer": None}, "lacks 'tokenizer'"),
        ({"job": 3}, "job must be a digest, got 3"),
    ],
)
def test_a_file_of_codes_with_rubbish_in_it(
    changes: dict[str, Any], message: str, taught: VisualTokenizer, world: Path, tmp_path: Path
) -> None:
    own = tmp_path / "codes.safetensors"
    make(taught, world / "images/val", own)
    read = read_checkpoint(own)
    facts = json.loads(read.metadata["facts"])
    metadata = {"content": read.metadata["content"]}
    for name, value in changes.items():
        kept: dict[str, Any] = read.state if name in read.state else facts
        if value is None:
            kept.pop(name, None)
        elif isinstance(value, bytes):
            kept[name] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        else:
            kept[name] = value(kept[name]) if callable(value) else value
    if "facts" not in changes:
        metadata["facts"] = json.dumps(facts)
    save_checkpoint(read.state, own, metadata=metadata)
    with pytest.raises(CheckpointError, match=rf"codes\.safetensors: .*{message}.*make it anew"):
        CodeFile.load(own)


def test_masked_data_takes_the_codes_of_its_files(
    taught: VisualTokenizer, world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.safetensors"
    make(taught, world / "images", out)
    mix = Mix(image=3, pair=2)
    live, kept = (data(world, mix, tokens) for tokens in (VisualTokens(taught), CodeFile.load(out)))
    for number in range(2):
        assert torch.equal(live[number].codes, kept[number].codes)
    assert live.identity == kept.identity
    with pytest.raises(ConfigError, match="codes of files are not those of changed images"):
        type(kept)(
            {"image": world / "imagenet.train.index.jsonl"},
            Mix(image=1),
            kept.processor,
            kept.visual_tokens,
            8,
            augment=Augment(flip=0.5),
        )
