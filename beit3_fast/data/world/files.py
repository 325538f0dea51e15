"""The world on disk, under the names and in the forms that the official tasks have.

================================================  ===============================================================
world.spm                                         SentencePiece model trained on the world's sentences
images/SPLIT/NUMBER.png                           the scenes; SPLIT is train, val or test
coco_retrieval.SPLIT.jsonl                        image and caption, ``CAPTIONS`` to an image
coco_captioning.SPLIT.jsonl                       for train the same; for val and test a line to an image, whose text is null
pairs.train.jsonl                                 image and caption of the scenes beyond ``labelled``
regions.SPLIT.jsonl                               image and one of its things in a few words, ``REGIONS`` to an image
vqa.{train,trainable_val,rest_val,test}.jsonl     image, question and answer; answer2label.txt
nlvr2.{train,dev,test-P}.index.jsonl              two images, a statement, and whether it is true
imagenet.{train,val}.index.jsonl                  image and class (ground and number of things); classes.txt
text.SPLIT.jsonl                                  sentences about scenes that were never drawn
instances_SPLIT.json                              boxes and masks in COCO's form, categories are shapes
masks/SPLIT/NUMBER.png                            shape of each pixel, counted from 1, and 0 for the ground
================================================  ===============================================================
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from beit3_fast.data.masking import check_seed, sample_generator
from beit3_fast.data.tokenizer import Tokenizer
from beit3_fast.data.world.folder import (
    appearing,
    check_pixels,
    is_finished,
    write_lines,
)
from beit3_fast.data.world.language import (
    ANSWERS,
    NUMBERS,
    caption,
    question,
    region,
    relation,
    statement,
)
from beit3_fast.data.world.scene import (
    GROUNDS,
    MOST_THINGS,
    SHAPES,
    Rendering,
    Scene,
    draw_scene,
    render,
)
from beit3_fast.errors import ConfigError

CAPTIONS = 2
REGIONS = 6
QUESTIONS = 8
SPLITS = ("train", "val", "test")
CLASSES = tuple(f"{NUMBERS[n]} on {g}" for g in GROUNDS for n in range(1, MOST_THINGS + 1))

_FORM = "beit3_fast world 6"
_PIECES, _TRAINING_SCENES = 200, 400
# What random numbers are drawn for; a scene is the same whatever is said about it.
_DRAWN, _SAID, _UNSEEN, _SPOKEN, _COMPARED, _TOLD = range(6)


@dataclasses.dataclass(frozen=True)
class WorldSize:
    """Scenes and sentences of each split, and of how many scenes of train the first have captions and questions for tasks (None: all).

    All have regions and classes, what pretraining needs. Raises ConfigError unless all are at least 2 and ``labelled`` at most ``train``.
    """

    train: int = 2000
    val: int = 200
    test: int = 200
    texts: int = 4000
    pixels: int = 64
    labelled: int | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name == "pixels" or (name == "labelled" and value is None):
                continue
            if type(value) is not int or value < 2:
                raise ConfigError(f"{name} must be an integer of at least 2, got {value!r}")
        check_pixels(self.pixels)
        if self.labelled is not None and self.labelled > self.train:
            raise ConfigError(f"labelled must be at most train, {self.train}, got {self.labelled}")


def write_world(folder: str | PathLike[str], size: WorldSize | None = None, seed: int = 0) -> Path:
    """Draw the world into ``folder``: the same files, byte for byte, for the same size, seed and libraries.

    The folder is there when all of it is, so what a killed call leaves is in no world; one that is complete is left as it is.
    Raises ConfigError for a seed below 0, and where the folder holds a world of another size or seed, or anything else.
    """
    check_seed(seed)
    size = size or WorldSize()
    root = Path(folder)
    settings = {"form": _FORM, "seed": seed, **dataclasses.asdict(size)}
    if not is_finished(root, settings):
        with appearing(root, settings) as unfinished:
            _write_all(unfinished, size, seed)
    return root


def _write_all(root: Path, size: WorldSize, seed: int) -> None:
    content = _sentencepiece(seed)
    (root / "world.spm").write_bytes(content)
    tokenizer = Tokenizer(content)
    answers = [{"answer": answer, "label": label} for label, answer in enumerate(ANSWERS)]
    write_lines(root / "answer2label.txt", answers)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    for split, name in enumerate(SPLITS):
        _write_split(root, name, split, getattr(size, name), size, seed, tokenizer)


def _write_split(
    root: Path, name: str, split: int, count: int, size: WorldSize, seed: int, tokenizer: Tokenizer
) -> None:
    for kind in ("images", "masks"):
        (root / kind / name).mkdir(parents=True, exist_ok=True)
    scenes = [draw_scene(sample_generator(seed, _DRAWN, split, n)) for n in range(count)]
    captions: list[dict[str, Any]] = []
    regions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    classes: list[dict[str, Any]] = []
    instances = _Instances()
    for number, scene in enumerate(scenes):
        path = f"images/{name}/{number:06}.png"
        drawn = render(scene, size.pixels)
        drawn.image.save(root / path)
        _semantic(scene, drawn).save(root / "masks" / name / f"{number:06}.png")
        instances.add(number, path, scene, drawn)
        luck = sample_generator(seed, _SAID, split, number)
        for _ in range(CAPTIONS):
            text = tokenizer.encode(caption(scene, luck))
            captions.append({"image_path": path, "text_segment": text, "image_id": number})
        told = sample_generator(seed, _TOLD, split, number)
        for _ in range(REGIONS):
            text = tokenizer.encode(region(scene, told))
            regions.append({"image_path": path, "text_segment": text, "image_id": number})
        for _ in range(QUESTIONS):
            asked = question(scene, luck)
            questions.append(
                {
                    "image_path": path,
                    "text_segment": tokenizer.encode(asked.text),
                    "labels": [ANSWERS.index(asked.answer)],
                    "scores": [1.0],
                    "qid": number * QUESTIONS + len(questions) % QUESTIONS,
                }
            )
        of_ground = list(GROUNDS).index(scene.ground) * MOST_THINGS
        classes.append({"image_path": path, "label": of_ground + len(scene.things) - 1})
    labelled = count if name != "train" or size.labelled is None else size.labelled
    if labelled < count:
        write_lines(root / f"pairs.{name}.jsonl", captions[labelled * CAPTIONS :])
    captions, questions = captions[: labelled * CAPTIONS], questions[: labelled * QUESTIONS]
    write_lines(root / f"coco_retrieval.{name}.jsonl", captions)
    if name != "train":
        captions = [{**row, "text_segment": None} for row in captions[::CAPTIONS]]
    write_lines(root / f"coco_captioning.{name}.jsonl", captions)
    write_lines(root / f"regions.{name}.jsonl", regions)
    if name == "train":
        kept = len(questions) // 10
        write_lines(root / "vqa.train.jsonl", questions[kept:])
        write_lines(root / "vqa.trainable_val.jsonl", questions[:kept])
    else:
        write_lines(root / f"vqa.{'rest_val' if name == 'val' else 'test'}.jsonl", questions)
    if name != "test":
        write_lines(root / f"imagenet.{name}.index.jsonl", classes)
    official = {"train": "train", "val": "dev", "test": "test-P"}[name]
    write_lines(
        root / f"nlvr2.{official}.index.jsonl", _compared(scenes, name, split, seed, tokenizer)
    )
    texts = size.texts if name == "train" else count
    sentences = (_unseen(seed, split, number) for number in range(texts))
    write_lines(
        root / f"text.{name}.jsonl", [{"text_segment": tokenizer.encode(s)} for s in sentences]
    )
    (root / f"instances_{name}.json").write_text(json.dumps(instances.table(size.pixels)))


def _compared(
    scenes: list[Scene], name: str, split: int, seed: int, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    rows = []
    for number, left in enumerate(scenes):
        luck = sample_generator(seed, _COMPARED, split, number)
        other = (number + 1 + int(luck.integers(len(scenes) - 1))) % len(scenes)
        said = statement(left, scenes[other], luck)
        rows.append(
            {
                "image_path": f"images/{name}/{number:06}.png",
                "image2_path": f"images/{name}/{other:06}.png",
                "text_segment": tokenizer.encode(said.text),
                "label": int(said.is_true),
                "identifier": f"{name}-{number}",
            }
        )
    return rows


class _Instances:
    """Boxes and masks, in COCO's form, with run lengths down the columns."""

    def __init__(self) -> None:
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, number: int, path: str, scene: Scene, drawn: Rendering) -> None:
        self._images.append({"id": number, "file_name": path})
        for thing, mask, box in zip(scene.things, drawn.masks, drawn.boxes, strict=True):
            flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
            ends = np.flatnonzero(flat[1:] != flat[:-1])
            runs = np.diff([0, *ends, mask.size] if ends[-1] < mask.size else [0, *ends])
            self._annotations.append(
                {
                    "id": len(self._annotations),
                    "image_id": number,
                    "category_id": SHAPES.index(thing.shape) + 1,
                    "bbox": list(box),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": list(mask.shape), "counts": runs.tolist()},
                    "colour": thing.colour,
                }
            )

    def table(self, pixels: int) -> dict[str, Any]:
        return {
            "images": [{**image, "width": pixels, "height": pixels} for image in self._images],
            "annotations": self._annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(SHAPES, 1)],
        }


def _semantic(scene: Scene, drawn: Rendering) -> Any:
    from PIL import Image

    shapes = np.zeros(drawn.masks.shape[1:], dtype=np.uint8)
    for thing, mask in zip(scene.things, drawn.masks, strict=True):
        shapes[mask] = SHAPES.index(thing.shape) + 1
    return Image.fromarray(shapes)


def _unseen(seed: int, split: int, number: int) -> str:
    luck = sample_generator(seed, _UNSEEN, split, number)
    scene = draw_scene(luck)
    return relation(scene, luck) if luck.random() < 0.4 else caption(scene, luck)


def _sentencepiece(seed: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=_spoken(seed),
        model_writer=model,
        # Whole words; unigram would spell most of so few.
        model_type="bpe",
        vocab_size=_PIECES,
        hard_vocab_limit=False,
        # A letter of one rare word, the z of zero, would be unknown.
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _spoken(seed: int) -> Iterator[str]:
    """Sentences of every kind, what the tokenizer is trained on."""
    for number in range(_TRAINING_SCENES):
        luck = sample_generator(seed, _SPOKEN, number)
        scene, other = draw_scene(luck), draw_scene(luck)
        asked = question(scene, luck)
        yield from (caption(scene, luck), relation(scene, luck), asked.text, asked.answer)
        yield region(scene, luck)
        yield statement(scene, other, luck).text
