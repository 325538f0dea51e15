"""What the index files say of a picture is what its annotations say."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beit3_fast.data import Tokenizer, read_labels
from beit3_fast.data.world import Scene, WorldSize, render, write_world
from beit3_fast.data.world.files import CLASSES, QUESTIONS
from beit3_fast.data.world.language import ANSWERS, NUMBERS

Things = list[tuple[str, str]]
"""Colour and shape of each thing of a picture."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = WorldSize(train=40, val=2, test=2, texts=40, pixels=24)
    return write_world(tmp_path_factory.mktemp("truth"), size, seed=5)


def rows(world: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / name).read_text().splitlines()]


def seen(world: Path) -> dict[str, Things]:
    table = json.loads((world / "instances_train.json").read_text())
    shapes = {own["id"]: own["name"] for own in table["categories"]}
    things: dict[str, Things] = {image["file_name"]: [] for image in table["images"]}
    names = {image["id"]: image["file_name"] for image in table["images"]}
    for own in table["annotations"]:
        things[names[own["image_id"]]].append((own["colour"], shapes[own["category_id"]]))
    return things


def is_shape(shape: str, plural: str) -> bool:
    return plural in (f"{shape}s", f"{shape}es")


def holds(text: str, left: Things, right: Things) -> bool:
    if match := re.fullmatch(
        r"there are more (\w+) in the (\w+) image than in the \w+ image", text
    ):
        counts = [sum(is_shape(s, match[1]) for _, s in own) for own in (left, right)]
        return counts[0] > counts[1] if match[2] == "left" else counts[1] > counts[0]
    if match := re.fullmatch(r"the (\w+) image has exactly (\w+) shapes?", text):
        return len(left if match[1] == "left" else right) == NUMBERS.index(match[2])
    match = re.fullmatch(r"both images show something (\w+)", text)
    assert match is not None
    return all(any(colour == match[1] for colour, _ in own) for own in (left, right))


def test_statements(world: Path) -> None:
    tokenizer, things = Tokenizer(world / "world.spm"), seen(world)
    said = rows(world, "nlvr2.train.index.jsonl")
    for row in said:
        text = tokenizer.decode(row["text_segment"])
        left, right = (things[row[key]] for key in ("image_path", "image2_path"))
        assert row["label"] == int(holds(text, left, right)), text
    assert len({row["identifier"] for row in said}) == len(said)
    numbers = [[int(Path(row[k]).stem) for k in ("image_path", "image2_path")] for row in said]
    assert len({(b - a) % len(said) for a, b in numbers}) > 10, "pairs are drawn"


def test_answers(world: Path) -> None:
    tokenizer, things = Tokenizer(world / "world.spm"), seen(world)
    classes = {r["image_path"]: r["label"] for r in rows(world, "imagenet.train.index.jsonl")}
    answers = read_labels(world / "answer2label.txt")
    assert answers == ANSWERS
    asked = rows(world, "vqa.trainable_val.jsonl") + rows(world, "vqa.train.jsonl")
    kinds = Counter[str]()
    for row in asked:
        text, answer = tokenizer.decode(row["text_segment"]), answers[row["labels"][0]]
        own = things[row["image_path"]]
        if text == "what is the ground?":
            assert CLASSES[classes[row["image_path"]]].endswith(f" on {answer}")
        elif match := re.fullmatch(r"how many (\w+)( shapes)? are there\?", text):
            count = sum(is_shape(s, match[1]) or c == match[1] for c, s in own)
            assert answer == ("zero" if count == 0 else NUMBERS[count])
        elif match := re.fullmatch(r"is there a (\w+) (\w+)\?", text):
            assert answer == ("yes" if (match[1], match[2]) in own else "no")
        elif match := re.fullmatch(r"what colour is the (\w+)\?", text):
            assert (answer, match[1]) in own
        else:
            continue
        kinds[text[:8]] += 1
    assert len(kinds) == 4
    first = [tokenizer.decode(row["text_segment"])[:8] for row in asked[::QUESTIONS]]
    assert len(set(first)) > 3, "questions are drawn for each picture"


def test_texts_are_captions_and_relations(world: Path) -> None:
    tokenizer = Tokenizer(world / "world.spm")
    texts = [tokenizer.decode(row["text_segment"]) for row in rows(world, "text.train.jsonl")]
    related = sum(
        bool(re.search(r" is (above|below|left of|right of|alone) ?", text)) for text in texts
    )
    assert 0.15 < related / len(texts) < 0.65


def test_the_ground_has_a_slope_and_a_grain() -> None:
    def ground(slope: tuple[float, float], grain: int) -> np.ndarray:
        return np.asarray(render(Scene((), "grass", slope, grain), 32).image, np.float64).mean(2)

    assert np.abs(ground((0, 0), 1) - ground((0, 0), 2)).max() > 3
    lighter = ground((0.2, 0), 1) - ground((0, 0), 1)
    assert lighter[:, -8:].mean() > 10 > -10 > lighter[:, :8].mean()
    lighter = ground((0, 0.2), 1) - ground((0, 0), 1)
    assert lighter[-8:].mean() > 10 > -10 > lighter[:8].mean()
