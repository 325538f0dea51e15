"""What a run cannot end with is said before anything is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_finetune import write
from test_recipe import RECIPE

from beit3_fast import cli

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")


def refused(call: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main([*call, "--out", str(out), "--quiet"]) == 1
    assert not out.exists(), "nothing was trained"
    return capsys.readouterr().err


@pytest.mark.parametrize("classes", [5, 5000, "true"])
def test_answers_are_as_many_as_the_model_s(
    classes: Any, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(world, "vqav2", (("[data]", f"num_classes = {classes}\n[data]"),))
    said = refused(["finetune", "--config", str(recipe)], tmp_path / "run", capsys)
    count = len((world / "answer2label.txt").read_text().splitlines())
    assert f"answer2label.txt names {count} answers" in said
    assert f"num_classes is {str(classes).title()}" in said


def test_answers_of_a_model_without_classes(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(
        world, "retrieval", (("batch_size", 'answers = "answer2label.txt"\nbatch_size'),)
    )
    said = refused(["finetune", "--config", str(recipe)], tmp_path / "run", capsys)
    assert "answers is for models with classes" in said


LINE = {"image_path": "images/val/000000.png", "text_segment": [5], "image_id": 0}
QUESTION = {**LINE, "labels": [0], "scores": [1.0]}


@pytest.mark.parametrize("section", ["data", "held_out"])
@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("vqav2", {**QUESTION, "labels": [99]}, "has answer 99, but the model only 0 to"),
        ("vqav2", {**QUESTION, "text_segment": [5, 99999]}, "has token id 99999, the model only"),
        ("retrieval", {**LINE, "text_segment": [99999]}, "has token id 99999, the model only"),
        ("retrieval", {**LINE, "text_segment": []}, "no words"),
    ],
)
def test_lines_that_do_not_fit_the_model(
    section: str,
    task: str,
    line: dict[str, Any],
    message: str,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (world / "odd.jsonl").write_text(json.dumps(line))
    recipe = write(world, task)
    head, _, rest = recipe.read_text().partition(f"[{section}]\n")
    recipe.write_text(f'{head}[{section}]\nindex = "odd.jsonl"\n{rest.partition(chr(10))[2]}')
    assert message in refused(["finetune", "--config", str(recipe)], tmp_path / "run", capsys)


def test_a_held_out_file_that_is_not_there(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(world, "vqav2", (("vqa.rest_val", "vqa.nowhere"),))
    said = refused(["finetune", "--config", str(recipe)], tmp_path / "run", capsys)
    assert "vqa.nowhere.jsonl' cannot be read" in said


@pytest.mark.parametrize("section", ["data", "held_out"])
def test_pretraining_texts_that_do_not_fit_the_model(
    section: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "odd.jsonl").write_text('{"text_segment": [5, 99999]}')
    recipe = world / "odd.toml"
    head, _, rest = RECIPE.partition(f"[{section}]\n")
    before, _, after = rest.partition('text = "')
    recipe.write_text(
        f'{head}[{section}]\n{before}text = "odd.jsonl{after[after.index(chr(34)) :]}'
    )
    assert cli.main(["pretrain", "--config", str(recipe), "--out", str(tmp_path), "--quiet"]) == 1
    assert "has token id 99999, the model only" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl")), "nothing was trained"
