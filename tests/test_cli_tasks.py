"""The commands with a model: what they print, for people and programs, and how they refuse."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cli_calls import refused
from products import ANSWERS, Shop

import beit3_fast
from beit3_fast import cli


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """The output of a command that succeeds; parsed, where --json was given."""

    def call(*arguments: str) -> Any:
        assert cli.main(arguments) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return json.loads(captured.out) if "--json" in arguments else captured.out

    return call


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(refused, capsys)


def test_caption(shop: Shop, run: Any) -> None:
    model, photos = shop.model("captioning"), shop.photos
    call = ("caption", *photos, *model, "--max-length", "8")
    report = run(*call, "--captions", "2", "--json")
    assert [entry["image"] for entry in report] == photos
    assert all(len(entry["captions"]) == 2 for entry in report)
    first = report[0]["captions"][0]
    assert set(first) == {"tokens", "score", "ended", "text"}
    lines = run(*call).splitlines()
    assert lines == [f"{e['image']}: {e['captions'][0]['text']}" for e in report]
    greedy = run("caption", photos[0], *model, "--num-beams", "1", "--max-length", "8")
    streamed = run("caption", photos[0], *model, "--stream", "--max-length", "8")
    assert greedy.removeprefix(f"{photos[0]}: ") == streamed
    drawn = ("--sample", "--top-k", "5", "--top-p", "0.9", "--temperature", "1.5", "--seed", "3")
    assert run(*call, *drawn) == run(*call, *drawn)
    assert run(*call, "--compat", "--length-penalty", "0", "--dtype", "bfloat16")


@pytest.mark.parametrize("batch_size", ["1", "2", "16"])
def test_one_bad_image_is_named_and_the_others_are_done(
    batch_size: str, shop: Shop, run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    photos = [shop.photos[0], str(bad), *shop.photos[1:]]
    options = ("--batch-size", batch_size, "--json")
    for call in (
        ("caption", *shop.model("captioning"), "--max-length", "6", *options),
        ("classify", *shop.model("imageclassification", tokenizer=False), *options),
        ("classify", "--label", "cat", "--label", "cup", *shop.model("retrieval"), *options),
    ):
        whole = run(*call, *shop.photos)
        assert cli.main((*call, *photos)) == 1
        captured = capsys.readouterr()
        found = json.loads(captured.out)
        assert [entry["image"] for entry in found] == [entry["image"] for entry in whole]
        name = "captions" if call[0] == "caption" else "classes"
        for entry, other in zip(found, whole, strict=True):
            for own, sound in zip(entry[name], other[name], strict=True):
                assert own == sound | {"score": pytest.approx(sound["score"], abs=1e-4)}
        assert captured.err.startswith(f"beit3-fast {call[0]}: skipped {bad}: ")
        assert captured.err.count("\n") == 1


def test_batches_are_drawn_apart(shop: Shop, run: Any) -> None:
    call = ("caption", *[shop.photos[0]] * 3, *shop.model("captioning"), "--sample", "--seed", "3")
    apart = run(*call, "--batch-size", "1", "--json")
    assert len({entry["captions"][0]["text"] for entry in apart}) == 3
    assert run(*call, "--batch-size", "1", "--json") == apart
    last = run(*call[:-1], str(2**63 - 1), "--batch-size", "1", "--json")
    assert len(last) == 3


def test_answer(shop: Shop, run: Any) -> None:
    questions = ["What animal is this?", "How many coins?"]
    call = ("answer", shop.photos[0], *questions, "--answers", shop.answers, "--top-k", "3")
    report = run(*call, *shop.model("vqav2"), "--json")
    assert [entry["question"] for entry in report] == questions
    for entry in report:
        labels = [guess["label"] for guess in entry["answers"]]
        assert len(labels) == 3
        assert [ANSWERS[guess["class_id"]] for guess in entry["answers"]] == labels
    lines = run(*call, *shop.model("vqav2")).splitlines()
    assert lines[0] == questions[0]
    assert lines[1].endswith(report[0]["answers"][0]["label"])


def test_reason(shop: Shop, run: Any) -> None:
    sentences = ["Both show an animal.", "One shows a tower."]
    call = ("reason", *shop.photos[:2], *sentences, *shop.model("nlvr2"))
    report = run(*call, "--json")
    assert [entry["sentence"] for entry in report] == sentences
    for entry, line in zip(report, run(*call).splitlines(), strict=True):
        assert entry["true"] is (entry["probability"] > 0.5)
        assert line.split()[0] == str(entry["true"]).lower()
        assert line.endswith(entry["sentence"])


def test_classify(shop: Shop, run: Any) -> None:
    call = ("classify", *shop.photos, "--top-k", "2")
    report = run(*call, *shop.model("imageclassification", tokenizer=False), "--json")
    assert [entry["image"] for entry in report] == shop.photos
    assert all(guess["label"] is None for entry in report for guess in entry["classes"])
    names = ("--label", "cat", "--label", "red cup", "--label", "pagoda", "--template", "the {}")
    report = run(*call, *names, *shop.model("retrieval"), "--json")
    assert all(len(entry["classes"]) == 2 for entry in report)
    assert {g["label"] for e in report for g in e["classes"]} <= {"cat", "red cup", "pagoda"}
    out = run(*call, *names, *shop.model("retrieval"))
    assert out.splitlines()[0] == f"{shop.photos[0]}:"


def test_classes_of_a_file(shop: Shop, run: Any, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(1000)))
    report = run(
        *("classify", shop.photos[0], "--labels", str(tmp_path / "names.txt"), "--json"),
        *shop.model("imageclassification", tokenizer=False),
    )
    for guess in report[0]["classes"]:
        assert guess["label"] == f"class {guess['class_id']}"


def test_search(shop: Shop, run: Any, tmp_path: Path) -> None:
    from PIL import Image

    folder, index = tmp_path / "photos", str(tmp_path / "photos.index")
    (folder / "more").mkdir(parents=True)
    for i, path in enumerate(shop.photos):
        with Image.open(path) as image:
            image.resize((40, 40)).save(folder / ("more" if i else "") / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    model = shop.model("retrieval")
    assert run("search", index, "--build", str(folder), *model) == f"{index}: 3 images\n"
    report = run("search", index, "a red cup", "--top-k", "2", *model, "--json")
    assert [entry["query"] for entry in report] == ["a red cup"]
    assert len(report[0]["hits"]) == 2
    own = str(folder / "0.png")
    report = run("search", index, "a cat", "--image", own, *model, "--json")
    assert report[1]["hits"][0]["name"] == own
    assert report[1]["hits"][0]["score"] == pytest.approx(1.0, abs=1e-4)
    lines = run("search", index, "a cat", *model, "--build", str(folder)).splitlines()
    assert lines[0] == "a cat"
    assert len(lines) == 4


@pytest.mark.parametrize("batch_size", ["1", "16"])
def test_an_index_is_made_without_a_bad_image(
    batch_size: str, shop: Shop, run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad, index = tmp_path / "bad.jpg", str(tmp_path / "photos.index")
    bad.write_text("no image")
    model = ("--batch-size", batch_size, *shop.model("retrieval", tokenizer=False))
    assert cli.main(("search", index, "--build", str(bad), *model)) == 1
    assert not Path(index).exists()
    capsys.readouterr()
    photos = [shop.photos[0], str(bad), *shop.photos[1:]]
    assert cli.main(("search", index, "--build", *photos, *model)) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{index}: {len(shop.photos)} images\n"
    assert captured.err.startswith(f"beit3-fast search: skipped {bad}: ")
    hits = run("search", index, "--image", shop.photos[1], *model, "--json")[0]["hits"]
    assert hits[0]["name"] == shop.photos[1]


def test_build_replaces_an_index_only(shop: Shop, run: Any, refuse: Any, tmp_path: Path) -> None:
    photo, index = tmp_path / "photo.png", str(tmp_path / "photos.index")
    photo.write_bytes(Path(shop.photos[0]).read_bytes())
    model = shop.model("retrieval", tokenizer=False)
    for target in (photo, tmp_path):
        message = refuse("search", str(target), "--build", shop.photos[1], *model)
        assert "is no index and is not replaced" in message
        assert "another name" in message
    assert photo.read_bytes() == Path(shop.photos[0]).read_bytes()
    build = ("search", index, "--build", str(tmp_path), str(photo), *model)
    assert run(*build) == f"{index}: 1 images\n"
    assert run(*build, "--image", str(photo)).splitlines()[1:] == [f"  1.000  {photo}"]


def test_embed(shop: Shop, run: Any, tmp_path: Path) -> None:
    out, model = str(tmp_path / "out"), shop.model("retrieval", tokenizer=False)
    call = ("embed", *shop.photos, "--out", out, "--shard-size", "2", "--workers", "0", *model)
    assert run(*call) == f"{out}: 3 embeddings in 2 shards, 0 items skipped\n"
    (report,) = run(*call, "--json")
    counts = {"shards": 2, "embedded": 3, "skipped": 0, "unread": 0, "resumed": 3}
    assert report == {"folder": out, **counts}
    hits = run("search", f"{out}/000000.safetensors", "--image", shop.photos[1], *model, "--json")
    assert hits[0]["hits"][0]["name"] == shop.photos[1]
    hits = run("search", out, "--image", shop.photos[2], *model, "--json")
    assert sorted(hit["name"] for hit in hits[0]["hits"]) == sorted(shop.photos)
    assert hits[0]["hits"][0]["name"] == shop.photos[2]


def test_an_index_of_another_model(shop: Shop, run: Any, refuse: Any, tmp_path: Path) -> None:
    index, model = str(tmp_path / "photos.index"), shop.model("retrieval", tokenizer=False)
    other = str(tmp_path / "other.safetensors")
    beit3_fast.save_checkpoint(beit3_fast.create_model(shop.name("retrieval")), other)
    run("search", index, "--build", *shop.photos, *model)
    query = ("search", index, "--image", shop.photos[0])
    assert run(*query, *model, "--dtype", "bfloat16").splitlines()[1].endswith(shop.photos[0])
    message = refuse(*query, "--model", shop.name("retrieval"), "--checkpoint", other)
    assert "made by another model or checkpoint" in message
    run("embed", *shop.photos, "--out", str(tmp_path / "cls"), "--output", "cls", *model)
    shard = str(tmp_path / "cls" / "000000.safetensors")
    assert "holds cls image embeddings" in refuse("search", shard, *query[2:], *model)


def test_what_is_refused(shop: Shop, refuse: Any, tmp_path: Path) -> None:
    photo = shop.photos[0]
    captioning, retrieval = shop.model("captioning"), shop.model("retrieval")
    classes = shop.model("imageclassification", tokenizer=False)
    index = str(tmp_path / "photos.index")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").write_text("cat\ndog\n")
    two = ("--labels", str(tmp_path / "two"))
    for arguments, message in (
        (("classify", photo, *two, *classes), "the label file names 2 classes"),
        (("caption", "missing.jpg", *captioning), "missing.jpg"),
        (("caption", photo, *captioning[:5], "none.spm"), "none.spm"),
        (("caption", photo, *captioning, "--dtype", "int4"), "dtype must be one of"),
        (("caption", photo, *captioning, "--device", "cuda:99"), "device 'cuda:99' is not there"),
        (("caption", photo, *captioning, "--impl", "x"), "impl must be 'auto' or one of"),
        (("caption", photo, *retrieval), "needs a model whose name ends in _captioning"),
        (("caption", photo, *captioning, "--top-k", "3"), "--top-k needs --sample"),
        (("caption", photo, *captioning, "--captions", "9"), "at most --num-beams"),
        (("caption", str(tmp_path / "empty"), *captioning), "has no image files"),
        (("caption", photo, *captioning, "--stream", "--json"), "leave out --json"),
        (("caption", photo, *captioning, "--stream", "--length-penalty", "3"), "--length-penalty"),
        (("caption", photo, photo, *captioning, "--stream"), "takes one image, got 2"),
        (
            ("caption", photo, "--model", "beit3_tiny_captioning", *captioning[2:]),
            "did you mean beit3_tiny_patch16_32_captioning",
        ),
        (("caption", photo, *captioning[:3], "none.pth", *captioning[4:]), "none.pth"),
        (
            ("answer", photo, "?", "--answers", "none.txt", *shop.model("vqav2")),
            "label file 'none.txt' cannot be read",
        ),
        (("reason", photo, "missing.jpg", "?", *shop.model("nlvr2")), "missing.jpg"),
        (("classify", photo, "--label", "cat", *retrieval[:4]), "--label needs --tokenizer"),
        (("classify", photo, *retrieval[:4]), "ends in _imageclassification"),
        (("classify", photo, "--template", "{}", *classes), "go with --label"),
        (
            ("classify", photo, "--label", "a", "--labels", "x", *retrieval),
            "--label classes of your own",
        ),
        (("classify", photo, "--label", "a", "--template", "b", *retrieval), "one {} for"),
        (("search", index, *retrieval), "nothing to do"),
        (("search", index, "a cat", *retrieval), "make an index with beit3-fast search --build"),
        (("search", index, "a cat", *retrieval[:4]), "texts need --tokenizer"),
        (("search", index, "--build", "missing.jpg", *retrieval), "missing.jpg"),
        (("embed", "missing.tar", "--out", index, *retrieval), "no file or folder 'missing.tar'"),
        (("embed", photo, "--out", index, "--kind", "x", *retrieval), "image, text, pair, got 'x'"),
        (("embed", photo, "--out", index, "--workers", "-1", *retrieval), "workers must be"),
        (("embed", photo, "--out", index, "--workers", "9999", *retrieval), "at most 256, got"),
        (("embed", photo, "--out", "", *retrieval), "folder must be a path, got ''"),
        (("embed", photo, "--out", index, "--output", "x", *retrieval), "pooled, cls, got 'x'"),
        (("embed", photo, "--out", index, "--format", "x", *retrieval), "parquet, got 'x'"),
        (("embed", photo, "--out", index, "--engine", "x", *retrieval), "ray, got 'x'"),
        (("search", f"{index}/no/x", "--build", photo, *retrieval), "does not exist; make it"),
        (("caption", photo, *captioning, "--device", "xpu"), "device 'xpu' cannot be used"),
        (
            ("caption", photo, *captioning, "--sample", "--seed", "9" * 30),
            "seed must be an integer from 0",
        ),
    ):
        assert message in refuse(*arguments)
    assert not Path(index).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("caption", "a.jpg"),
        ("caption", "a.jpg", "--model", "x", "--checkpoint", "y"),
        ("caption", "--num-beams", "0", "a.jpg"),
        ("caption", "--length-penalty", "x", "a.jpg"),
        ("answer", "a.jpg"),
        ("reason", "a.jpg", "b.jpg"),
        ("classify",),
        ("search",),
        ("embed", "photos"),
        ("search", "x", "--top-k", "-1"),
    ],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"beit3-fast {arguments[0]}: ")
    assert err.endswith(f"; see beit3-fast {arguments[0]} --help\n")
    assert err.count("\n") == 1
