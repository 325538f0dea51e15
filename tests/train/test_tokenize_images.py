"""Codes on the disk: those of the tokenizer, whole or continued, and what masked data modelling takes from them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_continuation import at_call, child
from tokenizer_runs import PIXELS, teach, tokenizer
from train_cases import data

from beit3_fast.checkpoint import save_checkpoint
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
    with pytest.raises(ConfigError, match="the beginning of another job"):
        make(tokenizer(seed=3), world / "images", out)
    with pytest.raises(ConfigError, match="the beginning of another job"):
        make(taught, world / "images/val", out)
    assert make(taught, world / "images", out, batch_size=4, workers=1).resumed == 9
    assert out.read_bytes() == whole.read_bytes()
    assert not begun.parent.exists()


def test_a_finished_file_is_left_as_it_is(
    taught: VisualTokenizer, world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.safetensors"
    first = make(taught, world / "images/val", out)
    before = out.stat().st_mtime_ns
    again = make(taught, world / "images/val", out)
    assert (again.images, again.resumed, again.used) == (first.images, first.images, first.used)
    assert out.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="holds codes of another tokenizer; give another file"):
        make(tokenizer(seed=3), world / "images/val", out)
    with pytest.raises(ConfigError, match="holds codes of other images; give another file"):
        make(taught, world / "images", out)


def test_images_that_cannot_be_read(
    taught: VisualTokenizer, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(world / "images/val", tmp_path / "images")
    (tmp_path / "images/broken.png").write_bytes(b"no picture")
    report = make(taught, tmp_path / "images", tmp_path / "codes.safetensors")
    count = len(list_images(world / "images/val"))
    assert (report.images, report.skipped) == (count, 1)
    assert "skipped" in caplog.text
    assert "broken.png" in caplog.text
    read = CodeFile.load(tmp_path / "codes.safetensors")
    assert int(read.codes.min()) >= 0
    os.rename(tmp_path / "images", tmp_path / "moved")
    with pytest.raises(InputError, match="none of the 1 images can be used"):
        make(taught, tmp_path / "moved/broken.png", tmp_path / "none.safetensors")
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
    with pytest.raises(ConfigError, match="batch_size must be a positive integer"):
        make(taught, world / "images", tmp_path / "codes.safetensors", batch_size=0)


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
