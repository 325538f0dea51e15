"""Errors of the command line name a way on that the command line has."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import refused, usage
from products import ANSWERS, Shop
from safetensors.torch import load_file

import beit3_fast
from beit3_fast import cli


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(refused, capsys)


def test_options_of_captions_by_their_own_names(shop: Shop, refuse: Any) -> None:
    model = shop.model("captioning")
    for options, message in (
        (("--captions", "5"), "--captions must be at most --num-beams = 3 without --sample, got 5"),
        (("--top-k", "5", "--seed", "5"), "--top-k, --seed needs --sample with --num-beams=1"),
        (("--sample", "--num-beams", "3"), "--sample draws words one by one and takes --num-beams"),
        (("--sample", "--compat"), "--compat is the released beam search"),
        (("--sample", "--temperature", "0"), "--temperature must be from 0.0001 to 10000, got 0.0"),
        (("--stream", "--top-p", "0.5"), "--top-p needs --sample"),
    ):
        said = refuse("caption", shop.photos[0], *model, *options)
        assert message in said
        assert "=True" not in said


def test_the_label_file_is_doubted_for_its_size_alone(
    shop: Shop, refuse: Any, tmp_path: Path
) -> None:
    call = ("answer", shop.photos[0], "?", "--answers", shop.answers)
    _, name, _, checkpoint, *rest = shop.model("vqav2")
    said = refuse(*call, "--model", name, "--checkpoint", str(tmp_path / "none.pth"), *rest)
    assert "none.pth: cannot be read: No such file or directory; check the path" in said
    assert "label file" not in said
    (tmp_path / "two.txt").write_text("yes\nno\n")
    call = (*call[:4], str(tmp_path / "two.txt"))
    said = refuse(*call, "--model", name, "--checkpoint", checkpoint, *rest)
    assert said.endswith("names 2 classes: is it the one that the model was trained with?\n")
    other = shop.checkpoint("retrieval")
    said = refuse(*call, "--model", name, "--checkpoint", other, *rest)
    assert said.endswith("name the model that the file is of, or give the file of this one\n")


def test_heads_of_another_size_ask_for_the_number_of_classes(
    shop: Shop, refuse: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shop.model("vqav2", tokenizer=False)
    _, name, _, checkpoint, *_ = model
    out, target = str(tmp_path / "out"), str(tmp_path / "out.safetensors")
    embed = ("embed", shop.photos[0], "--out", out, "--workers", "0", *model)
    convert = ("convert", checkpoint, target, "--name", name)
    bench = ("bench", "--seconds", "1", "--batch-size", "1", *model)
    for call in (embed, convert, bench):
        said = refuse(*call)
        assert said.endswith(
            "; if the model is right, say how many classes it has: --num-classes\n"
        )
        assert cli.main([*call, "--num-classes", str(len(ANSWERS))]) == 0
        capsys.readouterr()
    assert "--num-classes goes with --name" in refuse(*convert[:3], "--num-classes", "5", "--force")
    other = refuse("embed", shop.photos[0], "--out", out, *model[:2], *shop.model("retrieval")[2:4])
    assert other.endswith("name the model that the file is of, or give the file of this one\n")


def test_weights_that_are_not_finite(shop: Shop, refuse: Any, tmp_path: Path) -> None:
    state = load_file(shop.checkpoint("captioning"))
    next(iter(state.values())).view(-1)[0] = torch.nan
    path = tmp_path / "nan.pth"
    torch.save(state, path)
    _, name, _, _, *rest = shop.model("captioning")
    call = ("caption", shop.photos[0], "--model", name, "--checkpoint", str(path), *rest)
    said = refuse(*call)
    assert "holds NaN; download the file again, or train again from one that is finite" in said
    assert "name the model" not in said
    assert "allow_nonfinite" not in said
    with pytest.raises(beit3_fast.errors.CheckpointError, match="pass allow_nonfinite=True"):
        beit3_fast.create_model(name, path)


def test_convert_names_force(shop: Shop, refuse: Any, tmp_path: Path) -> None:
    target = tmp_path / "there.pth"
    target.write_text("mine")
    said = refuse("convert", shop.checkpoint("captioning"), str(target))
    assert "exists already; give another name, or --force to replace it" in said


def test_a_text_behind_build(shop: Shop, refuse: Any, tmp_path: Path) -> None:
    index = str(tmp_path / "photos.index")
    call = ("search", index, "--build", shop.photos[0], "a red cup", *shop.model("retrieval"))
    assert "'a red cup', which does not exist; texts to search for stand in front of" in refuse(
        *call
    )
    assert not os.path.exists(index)


def test_a_folder_of_nothing_is_not_searched(
    shop: Shop, refuse: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    out, model = str(tmp_path / "out"), shop.model("retrieval")
    call = ("embed", str(tmp_path / "bad.jpg"), "--out", out, "--workers", "0", *model)
    assert cli.main(call) == 1
    assert "none of the 1 items could be used" in capsys.readouterr().err
    said = refuse("search", out, "a cup", *model)
    assert "none of its 1 items could be used; its .skipped.jsonl files say why" in said


def test_what_is_no_index(shop: Shop, refuse: Any) -> None:
    for path in (shop.photos[2], shop.answers):
        said = refuse("search", path, "a cup", *shop.model("retrieval"))
        assert "it is no index; make one with beit3-fast search --build" in said


def test_verify_looks_for_the_file_first(refuse: Any) -> None:
    assert "nowhere.pth: cannot be read: No such file" in refuse("verify", "nowhere.pth")


def test_an_unknown_option_is_one_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = usage(capsys, "info", "--nope")
    assert (code, out) == (2, "")
    assert err == "beit3-fast info: no such option: --nope; see beit3-fast info --help\n"
    _, _, err = usage(capsys, "info", "foo")
    assert "too many arguments, or not in one place: foo; see beit3-fast info --help" in err


def test_an_index_that_may_not_be_read(
    shop: Shop, refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "captions.jsonl"
    lines.write_text("{}")

    real = Path.open

    def closed(self: Path, *given: Any, **options: Any) -> Any:
        if self == lines:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *given, **options)

    monkeypatch.setattr(Path, "open", closed)
    model = shop.model("retrieval")
    said = refuse("embed", str(lines), "--out", str(tmp_path / "out"), "--kind", "text", *model)
    assert "captions.jsonl' cannot be read (Permission denied; allow it, as its owner" in said


def test_a_manifest_that_is_damaged(shop: Shop, refuse: Any, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("1")
    said = refuse("search", str(tmp_path), "a cup", *shop.model("retrieval"))
    assert said.endswith("; embed again into another folder\n")
