"""What is left to look at: a page whose figures, curves and pictures are those of the runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_cases import PATCH, PIXELS, data, model

from beit3_fast import cli
from beit3_fast.checkpoint.atomic import replacing
from beit3_fast.data import Processor, Tokenizer
from beit3_fast.data.mixed import Mix
from beit3_fast.data.paired import PairedData, read_paired
from beit3_fast.data.question_batch import answer_scores, question_batch
from beit3_fast.errors import CheckpointError, InputError
from beit3_fast.model.pretraining import Predictions
from beit3_fast.train import report
from beit3_fast.train.downstream import DOWNSTREAM
from beit3_fast.train.examples import COUNT, Example, filled_in, found_images, given_answers
from beit3_fast.train.report import curves, write_page, write_report


def finished(folder: Path, figures: dict[str, Any], losses: list[float]) -> Path:
    folder.mkdir()
    lines = [{"step": n, "loss": v, "image": v, "lr": 0.1} for n, v in enumerate(losses, 1)]
    with replacing(folder / "log.jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    picture = Image.new("RGB", (8, 8), (200, 0, 0))
    examples = [Example("what <is> it?", ((picture, "red"),))] * 2
    write_report(folder, figures, examples)
    return folder


def test_a_page_about_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = finished(tmp_path / "one", {"held_out": {"image": {"accuracy": 0.5}}}, [3.0, 2.0, 1.0])
    second = finished(tmp_path / "two", {"steps": 1234, "begun": "<a>"}, [3.0, 1.0])
    page = tmp_path / "report.html"
    assert cli.main(["report", str(first), str(second), "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}: 2 runs\n"
    content = page.read_text()
    assert "<td>one</td><td>held_out image accuracy</td><td>0.5</td>" in content
    assert "<td>two</td><td>steps</td><td>1,234</td>" in content
    for name in ("one/examples.png", "two/examples.png", "report.png"):
        assert f'src="{name}"' in content
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 100
    assert 'src="curves.png"' in (first / "report.html").read_text()
    red = np.asarray(Image.open(first / "examples.png").convert("RGB"), np.int64)
    assert (np.abs(red - [200, 0, 0]).sum(2) < 30).sum() > 1000
    assert cli.main(["report", str(tmp_path), "--out", str(page)]) == 1
    assert "is written when a run of pretrain or finetune ends" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = finished(tmp_path / "a/vqa", {"loss": 1.0}, [3.0, 1.0])
    second = finished(tmp_path / "b/vqa", {"loss": 2.0}, [3.0, 2.0])
    monkeypatch.setattr(report, "_draw_curves", lambda path, terms: drawn.update(terms))
    content = write_page(tmp_path / "page.html", [first, second, first]).read_text()
    assert drawn["image"] == {
        str(first): [(1, 3.0), (2, 1.0)],
        str(second): [(1, 3.0), (2, 2.0)],
    }
    for folder, loss in ((first, 1), (second, 2)):
        assert content.count(f"<td>{folder}</td><td>loss</td><td>{loss}</td>") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.json", "[]", r"no report\.json that can be read \(expected figures by name"),
        ("report.json", "{", r"no report\.json that can be read"),
        ("log.jsonl", "[1]\n", r'line 1 must be JSON, got .*expected {"step": 1'),
        ("log.jsonl", '{"step": 1, "image": "x"}\n', "image is no number"),
        ("log.jsonl", None, r"log\.jsonl cannot be read .*give the folder of a run"),
    ],
)
def test_runs_that_cannot_be_read(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    folders = [finished(tmp_path / own, {}, [1.0]) for own in ("one", "two")]
    (folders[1] / name).unlink()
    if content is not None:
        (folders[1] / name).write_text(content)
    with pytest.raises((InputError, CheckpointError), match=message):
        write_page(tmp_path / "page.html", folders)


def test_every_point_of_a_curve_is_the_mean_of_as_many_steps(tmp_path: Path) -> None:
    folder = finished(tmp_path / "one", {}, [1.0, 3.0] * 90 + [100.0])
    points = curves(folder)["image"]
    assert points[0] == (3, pytest.approx(5 / 3))
    assert points[-1] == (181, pytest.approx((3.0 + 1.0 + 3.0 + 100.0) / 4))
    assert len(points) == 60


def test_without_matplotlib_the_figures_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = finished(tmp_path / "one", {"loss": 1.5}, [1.5])
    assert json.loads((folder / "report.json").read_text()) == {"loss": 1.5}
    assert not list(folder.glob("*.png"))


def test_hidden_patches_and_words_are_filled_in(world: Path) -> None:
    batches = data(world, Mix(image=1, text=1, pair=2))
    own = model(world)
    truth: list[Any] = []

    def right(batch: Any) -> dict[str, Predictions]:
        codes = batch.codes[batch.counts["image"] :]
        words = batch.words[: batch.counts["pair_text"]].clone()
        words[0] = batches.processor.tokenizer.encode("red")[0]  # type: ignore[union-attr]
        truth.append((batch, codes, words))
        true = batch.words[: batch.counts["pair_text"]]
        return {"pair_image": Predictions(codes, codes), "pair_text": Predictions(words, true)}

    own.predict = right  # type: ignore[assignment, method-assign]
    examples = filled_in(own, batches)
    assert len(examples) == COUNT
    batch, codes, _ = truth[0]
    image, seen, predicted = (np.asarray(p, np.int64) for p, _ in examples[0].pictures)
    assert image.shape == (PIXELS, PIXELS, 3)
    hidden = batch.hidden_patches[1].view(PIXELS // PATCH, -1)
    where = hidden.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1).numpy()
    assert (seen[where] == 128).all()
    assert (seen[~where] == image[~where]).all()
    assert (predicted[~where] == image[~where]).all()
    top, left = (int(n) * PATCH for n in hidden.nonzero()[0])
    centre = batches.visual_tokens.centres[codes[0]].view(3, PATCH, PATCH)  # type: ignore[union-attr]
    expected = ((centre.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).round().numpy()
    assert np.abs(predicted[top : top + PATCH, left : left + PATCH] - expected).max() <= 1
    words = batch.text_lengths[0] - 2
    assert len(examples[0].text.split()) >= words
    assert examples[0].text.count("[") == int(batch.hidden_words[: words + 2].sum())
    assert sum(example.text.count("right:") for example in examples[:2]) <= 1, "one word is wrong"
    assert filled_in(own, data(world, Mix(image=1, text=1))) == []


def test_answers_and_what_was_right(world: Path) -> None:
    rows = read_paired(world / "vqa.rest_val.jsonl", answer_scores)
    processor = Processor(Tokenizer(world / "world.spm"), image_size=PIXELS)
    pairs = PairedData(rows, 4, processor, lambda b, t: question_batch(b, t, 40))
    shown = list({row.image: row for row in rows}.values())[:COUNT]
    right = [row.target[0][0] for row in shown]

    class Mostly(torch.nn.Linear):
        def forward(self, image: Any, question: Any, padding_mask: Any) -> Any:  # type: ignore[override]
            given = torch.tensor([39, *right[1:]])
            return torch.nn.functional.one_hot(given, 40)

    labels = [f"answer {n}" for n in range(40)]
    examples = given_answers(Mostly(1, 1), pairs, labels)
    assert [e.pictures[0][1] for e in examples] == [
        f"answer 39 (right: answer {right[0]})",
        *(f"answer {n}" for n in right[1:]),
    ]
    assert examples[0].text.endswith("?")
    asked = [row._replace(target=()) for row in rows]
    unknown = PairedData(asked, 4, processor, pairs.collate)
    examples = given_answers(Mostly(1, 1), unknown, labels[:39])
    assert examples[0].pictures[0][1] == "39 (right: none is given)", "an answer without a name"


def test_the_right_image_is_marked(world: Path) -> None:
    rows = read_paired(world / "coco_retrieval.val.jsonl", DOWNSTREAM["retrieval"].target)
    processor = Processor(Tokenizer(world / "world.spm"), image_size=PIXELS)
    pairs = PairedData(rows, 4, processor, lambda batch, targets: batch)

    class Second(torch.nn.Linear):
        """The right image is always second."""

        def encode_image(self, images: list[str], **_: Any) -> Any:
            return torch.eye(len(images))

        def encode_text(self, texts: Any) -> Any:
            right = torch.eye(len(texts))
            return right + 2 * right.roll(1, 0)

    examples = found_images(Second(1, 1), pairs, None)
    assert [[words for _, words in own.pictures] for own in examples] == [["", "right", ""]] * COUNT
    assert all(" on " in own.text or own.text.startswith("on ") for own in examples)


def test_a_question_that_no_answer_is_right_for_says_so(world: Path) -> None:
    rows = read_paired(world / "vqa.rest_val.jsonl", answer_scores)[:1]
    processor = Processor(Tokenizer(world / "world.spm"), image_size=PIXELS)
    rows = [rows[0]._replace(target=())]
    pairs = PairedData(rows, 4, processor, lambda b, t: question_batch(b, t, 4))

    class Third(torch.nn.Linear):
        def forward(self, image: Any, question: Any, padding_mask: Any) -> Any:  # type: ignore[override]
            return torch.tensor([[0.0, 0.0, 1.0, 0.0]])

    (example,) = given_answers(Third(1, 1), pairs, ["red", "green", "blue", "white"])
    assert example.pictures[0][1] == "blue (right: none is given)"
