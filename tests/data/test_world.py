"""The world: what its files say is what its scenes are, and all of it follows from the seed."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit3_fast.data import Tokenizer, read_labels
from beit3_fast.data.masking import sample_generator
from beit3_fast.data.world import (
    Scene,
    Thing,
    WorldSize,
    caption,
    digits,
    draw_scene,
    question,
    region,
    render,
    statement,
    write_digits,
    write_world,
)
from beit3_fast.data.world.digits import WORDS
from beit3_fast.data.world.files import CAPTIONS, CLASSES, QUESTIONS, REGIONS
from beit3_fast.data.world.language import ANSWERS, NUMBERS, relation
from beit3_fast.data.world.scene import COLOURS, GROUNDS
from beit3_fast.errors import ConfigError

SIZE = WorldSize(train=12, val=4, test=3, texts=10, pixels=48)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), SIZE, seed=3)


def scenes(count: int) -> list[tuple[Scene, np.random.Generator]]:
    drawn = [sample_generator(7, number) for number in range(count)]
    return [(draw_scene(luck), luck) for luck in drawn]


def rows(world: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / name).read_text().splitlines()]


def test_the_picture_shows_the_scene() -> None:
    for scene, _ in scenes(40):
        image, masks, boxes = render(scene, 96)
        pixels = np.asarray(image)
        assert masks.sum(0).max() <= 1, "things do not overlap"
        for thing, mask, box in zip(scene.things, masks, boxes, strict=True):
            x, y, width, height = box
            inside = mask[y : y + height, x : x + width]
            assert inside.sum() == mask.sum()
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            assert thing.column * 32 - 1 <= x <= x + width <= (thing.column + 1) * 32 + 1
            assert thing.row * 32 - 1 <= y <= y + height <= (thing.row + 1) * 32 + 1
            colour = np.median(pixels[mask], axis=0)
            assert np.abs(colour - COLOURS[thing.colour]).max() < 10
        ground = pixels[~masks.any(0)].mean(0)
        assert np.abs(ground - GROUNDS[scene.ground]).max() < 25


def test_shapes_and_sizes_differ() -> None:
    areas = {}
    for shape in ("circle", "square", "triangle", "cross"):
        for size in ("small", "large"):
            scene = Scene((Thing(shape, "red", size, 4),), "sand", (0.0, 0.0), 0)
            areas[shape, size] = int(render(scene, 96).masks.sum())
    assert len(set(areas.values())) == 8
    assert all(areas[s, "large"] > 2 * areas[s, "small"] for s, _ in areas)


def count_in(scene: Scene, text: str) -> int:
    """How many things have the colour or shape that a question names."""
    word = text.split()[2]
    shape = re.sub("s$", "", word) if word != "crosses" else "cross"
    return sum(word == t.colour or shape == t.shape for t in scene.things)


def test_answers_are_true() -> None:
    kinds = Counter[str]()
    for scene, luck in scenes(600):
        text, answer = question(scene, luck)
        kinds[text.split()[0] + text.split()[1]] += 1
        assert answer in ANSWERS
        if text.startswith("what colour"):
            shape = text.rstrip("?").split()[-1]
            assert [t.colour for t in scene.things if t.shape == shape] == [answer]
        elif text.startswith("what shape"):
            place = text.removeprefix("what shape is at the ").rstrip("?")
            assert [t.shape for t in scene.things if t.place == place] == [answer]
        elif text.startswith("how many"):
            count = count_in(scene, text)
            assert answer == ("zero" if count == 0 else NUMBERS[count])
        elif text.startswith("what is"):
            assert answer == scene.ground
        else:
            words = text.rstrip("?").split()
            there = {(t.colour, t.shape): t for t in scene.things}
            if words[:3] == ["is", "there", "a"]:
                holds = (words[3], words[4]) in there
            else:
                a, b = there[words[2], words[3]], there[words[-2], words[-1]]
                holds = {
                    "above": a.row < b.row,
                    "below": a.row > b.row,
                    "left": a.row == b.row and a.column < b.column,
                    "right": a.row == b.row and a.column > b.column,
                }[words[4]]
            assert answer == ("yes" if holds else "no")
    assert min(kinds.values()) > 30
    asked = [question(scene, luck) for scene, luck in scenes(2000)]
    yes, no = (sum(a.answer == word for a in asked) for word in ("yes", "no"))
    assert 0.4 < yes / (yes + no) < 0.6


def test_statements_hold_or_do_not() -> None:
    said = []
    for (left, luck), (right, _) in zip(scenes(400), scenes(500)[100:], strict=True):
        text, is_true = statement(left, right, luck)
        said.append(is_true)
        if match := re.match(r"there are more (\w+?)(?:es|s)? in the (left|right) image", text):
            shape = match[1] if match[1] in ("cross",) else match[1].removesuffix("s")
            shape = {"circl": "circle", "squar": "square", "triangl": "triangle"}.get(shape, shape)
            counts = [sum(t.shape == shape for t in scene.things) for scene in (left, right)]
            assert is_true is (
                counts[0] > counts[1] if match[2] == "left" else counts[1] > counts[0]
            )
        elif match := re.match(r"the (left|right) image has exactly (\w+) shape", text):
            scene = left if match[1] == "left" else right
            assert is_true is (len(scene.things) == NUMBERS.index(match[2]))
        else:
            colour = text.removeprefix("both images show something ")
            assert is_true is all(
                colour in {t.colour for t in scene.things} for scene in (left, right)
            )
    assert 0.4 < np.mean(said) < 0.6


def test_captions_name_every_thing() -> None:
    for scene, luck in scenes(50):
        text = caption(scene, luck)
        assert scene.ground in text
        for word in (w for t in scene.things for w in (t.colour, t.shape, t.size)):
            assert word in text
        assert relation(scene, luck)


def test_regions_are_true() -> None:
    manners = Counter[str]()
    for scene, luck in scenes(200):
        text = region(scene, luck)
        things = [(t.size, t.colour, t.shape, t.place) for t in scene.things]
        if match := re.fullmatch(r"(\w+) (\w+) (\w+) at (.+) on (\w+)", text):
            assert match.groups()[:4] in things
            assert match[5] == scene.ground
        elif match := re.fullmatch(r"(\w+) (\w+) at (.+)", text):
            assert match.groups() in [thing[1:] for thing in things]
        else:
            match = re.fullmatch(r"(.+): (\w+) (\w+)", text)
            assert match is not None
            assert (match[2], match[3], match[1]) in [thing[1:] for thing in things]
        manners[match.re.pattern] += 1
    assert len(manners) == 3
    assert min(manners.values()) > 40


def test_the_same_seed_gives_the_same_files(world: Path, tmp_path: Path) -> None:
    again = write_world(tmp_path / "again", SIZE, seed=3)
    other = write_world(tmp_path / "other", SIZE, seed=4)
    paths = sorted(p.relative_to(world) for p in world.rglob("*") if p.is_file())
    assert paths == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((world / p).read_bytes() == (again / p).read_bytes() for p in paths)
    changed = [p for p in paths if (world / p).read_bytes() != (other / p).read_bytes()]
    assert len([p for p in changed if p.suffix == ".png"]) > 30
    assert Path("vqa.train.jsonl") in changed


def test_no_split_has_scenes_of_another(world: Path) -> None:
    pictures, sentences = [], []
    for split, count in (("train", 12), ("val", 4), ("test", 3)):
        own = {path.read_bytes() for path in (world / "images" / split).iterdir()}
        assert len(own) == count
        pictures.append(own)
        told = [tuple(row["text_segment"]) for row in rows(world, f"text.{split}.jsonl")]
        sentences.append(told[:3])
    for one, other in combinations(pictures, 2):
        assert not one & other
    for one, other in combinations(sentences, 2):
        assert one != other


def test_a_finished_world_is_kept_and_another_refused(world: Path) -> None:
    before = (world / "images/train/000000.png").stat().st_mtime_ns
    (world / "recipe.toml").write_text("the user's own")
    assert write_world(world, SIZE, seed=3) == world
    assert (world / "images/train/000000.png").stat().st_mtime_ns == before
    (world / "recipe.toml").unlink()
    with pytest.raises(ConfigError, match="holds another world"):
        write_world(world, SIZE, seed=5)
    with pytest.raises(ConfigError, match="train must be an integer of at least 2, got 1"):
        WorldSize(train=1)
    with pytest.raises(ConfigError, match="labelled must be at most train, 3, got 4"):
        WorldSize(train=3, labelled=4)


def test_labels_for_the_first_scenes_only(tmp_path: Path) -> None:
    root = write_world(tmp_path, WorldSize(train=5, val=3, test=2, texts=2, labelled=3))
    asked = rows(root, "vqa.train.jsonl") + rows(root, "vqa.trainable_val.jsonl")
    first = {f"images/train/{number:06}.png" for number in range(3)}
    assert {row["image_path"] for row in asked} == first
    assert len(asked) == 3 * QUESTIONS
    for task, held_out in (("coco_retrieval", CAPTIONS), ("coco_captioning", 1)):
        assert {row["image_path"] for row in rows(root, f"{task}.train.jsonl")} == first
        assert len(rows(root, f"{task}.val.jsonl")) == 3 * held_out
    assert [row["image_id"] for row in rows(root, "pairs.train.jsonl")] == [3, 3, 4, 4]
    assert len(rows(root, "regions.train.jsonl")) == 5 * REGIONS
    assert len(rows(root, "imagenet.train.index.jsonl")) == 5


def test_the_files_of_the_official_tasks(world: Path) -> None:
    tokenizer = Tokenizer(world / "world.spm")
    answers = read_labels(world / "answer2label.txt")
    assert answers == ANSWERS
    for split, count in (("train", 12), ("val", 4), ("test", 3)):
        assert len(rows(world, f"text.{split}.jsonl")) == (10 if split == "train" else count)
        pairs = rows(world, f"coco_retrieval.{split}.jsonl")
        assert len(pairs) == CAPTIONS * count
        assert {row["image_id"] for row in pairs} == set(range(count))
        for row in pairs:
            assert Image.open(world / row["image_path"]).size == (48, 48)
            assert 3 not in row["text_segment"], "every sentence has its words"
            assert "on " in tokenizer.decode(row["text_segment"])
        captioning = rows(world, f"coco_captioning.{split}.jsonl")
        if split == "train":
            assert captioning == pairs
        else:
            assert captioning == [{**row, "text_segment": None} for row in pairs[::CAPTIONS]]
        regions = rows(world, f"regions.{split}.jsonl")
        assert Counter(row["image_id"] for row in regions) == dict.fromkeys(range(count), REGIONS)
        assert all(3 not in row["text_segment"] for row in regions)
    train = rows(world, "vqa.train.jsonl") + rows(world, "vqa.trainable_val.jsonl")
    assert len(train) == 12 * QUESTIONS
    assert len({row["qid"] for row in train}) == 12 * QUESTIONS
    assert len(rows(world, "vqa.rest_val.jsonl")) == 4 * QUESTIONS
    for row in train:
        assert answers[row["labels"][0]]
        assert tokenizer.decode(row["text_segment"]).endswith("?")
    for name, count in (("train", 12), ("dev", 4), ("test-P", 3)):
        statements = rows(world, f"nlvr2.{name}.index.jsonl")
        assert len(statements) == count
        assert all(row["image_path"] != row["image2_path"] for row in statements)
        assert {row["label"] for row in statements} <= {0, 1}
    assert read_labels(world / "classes.txt") == CLASSES
    labels = rows(world, "imagenet.train.index.jsonl")
    assert {row["label"] for row in labels} <= set(range(len(CLASSES)))


def test_annotations_are_what_is_seen_and_said(world: Path) -> None:
    tokenizer = Tokenizer(world / "world.spm")
    for split in ("train", "val", "test"):
        table = json.loads((world / f"instances_{split}.json").read_text())
        said = {row["image_id"]: row for row in rows(world, f"coco_retrieval.{split}.jsonl")}
        shapes = {category["id"]: category["name"] for category in table["categories"]}
        numbers = [annotation["id"] for annotation in table["annotations"]]
        assert len(set(numbers)) == len(numbers)
        for image in table["images"]:
            row = said.pop(image["id"])
            assert image["file_name"] == row["image_path"]
            pixels = np.asarray(Image.open(world / image["file_name"]))
            assert (image["height"], image["width"]) == pixels.shape[:2]
            text = tokenizer.decode(row["text_segment"])
            for annotation in table["annotations"]:
                if annotation["image_id"] != image["id"]:
                    continue
                colour, shape = annotation["colour"], shapes[annotation["category_id"]]
                assert f"{colour} {shape}" in text
                assert annotation["iscrowd"] == 0
                mask = pixels_of(annotation)
                assert np.abs(np.median(pixels[mask], axis=0) - COLOURS[colour]).max() < 10
        assert not said


def pixels_of(annotation: dict[str, Any]) -> np.ndarray:
    """bool [H, W] from run lengths."""
    size, counts = annotation["segmentation"]["size"], annotation["segmentation"]["counts"]
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size, order="F")


def test_boxes_and_masks(world: Path) -> None:
    table = json.loads((world / "instances_train.json").read_text())
    labels = {r["image_path"]: r["label"] for r in rows(world, "imagenet.train.index.jsonl")}
    for image in table["images"]:
        own = [a for a in table["annotations"] if a["image_id"] == image["id"]]
        things = CLASSES[labels[image["file_name"]]].split()[0]
        assert len(own) == NUMBERS.index(things)
        semantic = np.asarray(Image.open(world / "masks/train" / Path(image["file_name"]).name))
        merged = np.zeros_like(semantic)
        for annotation in own:
            runs = pixels_of(annotation)
            assert runs.sum() == annotation["area"]
            x, y, width, height = annotation["bbox"]
            assert runs[y : y + height, x : x + width].sum() == annotation["area"]
            merged[runs] = annotation["category_id"]
        assert np.array_equal(merged, semantic)


def test_real_digits_with_captions(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="holds no world"):
        write_digits(tmp_path)
    folder = tmp_path / "world"
    folder.mkdir()
    (folder / "world.spm").write_bytes((world / "world.spm").read_bytes())
    real = digits._load()
    # Fewer than there are, so that the test is quick; more than are held out.
    monkeypatch.setattr(digits, "HELD_OUT", 12)
    monkeypatch.setattr(digits, "_load", lambda: (real[0][:50], real[1][:50]))
    assert write_digits(folder, pixels=48, seed=2) == 50
    tokenizer = Tokenizer(folder / "world.spm")
    seen: dict[bytes, str] = {}
    counts = {}
    for split in ("train", "val", "test"):
        told = rows(folder, f"digits_retrieval.{split}.jsonl")
        counts[split] = len({row["image_path"] for row in told})
        for row in told:
            picture = np.asarray(Image.open(folder / row["image_path"]))
            assert picture.shape == (48, 48, 3)
            assert seen.setdefault(picture.tobytes(), split) == split, "no digit is in two splits"
            said = tokenizer.decode(row["text_segment"]).split()
            (word,) = set(said) & set(WORDS)
            small = np.asarray(
                Image.fromarray(picture).convert("L").resize((8, 8), Image.Resampling.BOX)
            )
            nearest = np.abs(real[0][:50] * 255 / 16 - small).mean((1, 2)).argmin()
            assert WORDS[real[1][nearest]] == word
    assert counts == {"train": 26, "val": 12, "test": 12}
    labels = [row["label"] for row in rows(folder, "digits.val.index.jsonl")]
    said = [tokenizer.decode(r["text_segment"]) for r in rows(folder, "digits_retrieval.val.jsonl")]
    assert all(WORDS[label] in text for label, text in zip(labels, said[::2], strict=True))


def test_digits_need_scikit_learn(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        write_digits(world)
