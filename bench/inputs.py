"""Real photographs and real sentences, as the tensors that a BEiT-3 forward takes.

The photographs ship with scikit-image and scikit-learn; the sentences describe them. Words and
punctuation marks become token ids by a fixed hash into the vocabulary, not by the SentencePiece model
of BEiT-3 (its file is not ours to ship): lengths, raggedness and the spread of the ids over the
embedding table are real, the ids mean nothing. The weights are random, so nothing is lost by that.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from beit3_fast.errors import InputError

BOS, PAD, EOS = 0, 1, 2
_FIRST_WORD_ID = 4


@dataclass(frozen=True)
class Scene:
    """One photograph, and what one may say or ask about it."""

    package: str
    file: str
    caption: str
    question: str
    statement: str


# Captions have 8 to 32 tokens with BOS and EOS; the first eight hold both ends.
SCENES = (
    Scene(
        "skimage",
        "data/motorcycle_left.png",
        "A red motorcycle leans on its stand in a garage full of shelves and tools.",
        "Which wheel of the motorcycle is nearer to the camera?",
        "At least one vehicle with two wheels is parked inside a building.",
    ),
    Scene(
        "skimage",
        "data/chelsea.png",
        "A cat with big green eyes",
        "What animal is this?",
        "Both photographs show an animal.",
    ),
    Scene(
        "sklearn",
        "datasets/images/china.jpg",
        "A Chinese pagoda with red pillars and a green tiled roof rises above dark trees, and "
        "behind it a lake disappears into the haze of a summer morning.",
        "How many storeys does the tower beside the lake have?",
        "One image shows a tower beside the water, and the other one shows something indoors.",
    ),
    Scene(
        "skimage",
        "data/coffee.png",
        "A red cup of espresso on a table.",
        "What colour is the saucer under the cup?",
        "There is a drink in exactly one of the two images.",
    ),
    Scene(
        "skimage",
        "data/astronaut.png",
        "A smiling astronaut in an orange suit sits before a flag and a model of the space shuttle.",
        "Is she wearing her helmet?",
        "A person looks into the camera in the left image, and nobody does so in the right one.",
    ),
    Scene(
        "skimage",
        "data/rocket.jpg",
        "A white rocket stands on its launch pad at night, lit from below.",
        "What time of the day is it?",
        "The sky is dark in both images.",
    ),
    Scene(
        "sklearn",
        "datasets/images/flower.jpg",
        "One large orange dahlia in full bloom, its petals folded like paper, glows before a "
        "background of blurred leaves in deep green.",
        "What is the main colour of the flower in the middle?",
        "A single flower fills most of one image, while the other image shows something made by people.",
    ),
    Scene(
        "skimage",
        "data/camera.png",
        "In an old photograph, a man in a long black coat looks through a film camera on a tripod.",
        "Does the man look towards the left or the right?",
        "Somebody takes a picture in one of the images.",
    ),
    Scene(
        "skimage",
        "data/coins.png",
        "Twenty-four old silver coins in four rows.",
        "How many coins are in the last row?",
        "One image holds more than ten objects that are almost round.",
    ),
    Scene(
        "skimage",
        "data/hubble_deep_field.jpg",
        "Hundreds of distant galaxies, some of them blue and some of them red, are scattered over a "
        "black sky.",
        "Is this a photograph of the day or of the night sky?",
        "Neither of the two images shows a human being.",
    ),
    Scene(
        "skimage",
        "data/retina.jpg",
        "The back of a human eye, with fine vessels that spread from one bright spot.",
        "Where is the bright spot?",
        "The left image was made by a doctor and the right one by an artist.",
    ),
    Scene(
        "skimage",
        "data/moon.png",
        "The grey surface of the moon with one round crater.",
        "What is in the upper left corner of the picture?",
        "A crater can be seen in at least one of the images.",
    ),
)


def words_to_ids(sentence: str, vocab_size: int) -> list[int]:
    """BOS, one id for every word and punctuation mark, EOS. The same sentence gives the same ids."""
    words = re.findall(r"\w+|[^\w\s]", sentence)
    # The last eight rows of the official vocabulary are unused, and one before them is the mask.
    span = vocab_size - 10 - _FIRST_WORD_ID
    return [BOS, *(_FIRST_WORD_ID + zlib.crc32(w.lower().encode()) % span for w in words), EOS]


def text_batch(sentences: list[str], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, Nt] int64, padded to the longest of the batch, and the padding [B, Nt] bool."""
    rows = [words_to_ids(s, vocab_size) for s in sentences]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest)[None, :] >= lengths[:, None]


def photo_batch(indices: list[int], size: int) -> Tensor:
    """Photographs [B, 3, size, size] fp32, by the official preset for image-text tasks.

    Squashed to a square by bicubic interpolation, mean and standard deviation 0.5. An index past the
    last photograph takes the same ones again, each time cut a little closer and mirrored every other
    time, so that no two samples of a batch are equal.
    """
    return torch.stack([_pixels(i, size) for i in indices])


def photo_pieces(numbers: Iterable[int], size: int) -> Tensor:
    """Pieces of the photographs [B, 3, size, size] fp32, one for each number, preset as in ``photo_batch``.

    Place, extent (a third of the photograph to all of it) and mirroring follow from the number alone.
    """
    pieces = []
    for number in numbers:
        draw = Random(number)
        width, height = (draw.uniform(0.33, 1.0) for _ in range(2))
        left, top = draw.uniform(0, 1 - width), draw.uniform(0, 1 - height)
        box = (left, top, left + width, top + height)
        pieces.append(_cut(number % len(SCENES), box, draw.random() < 0.5, size))
    return torch.stack(pieces)


def photo_files(folder: Path, count: int, width: int = 640, height: int = 480) -> None:
    """``count`` JPEG files in a new folder, pieces of the photographs, as large as those of COCO."""
    folder.mkdir(parents=True)
    for number in range(count):
        draw = Random(number)
        image = _photograph(number % len(SCENES))
        left, top = draw.uniform(0, 0.3) * image.width, draw.uniform(0, 0.3) * image.height
        box = (int(left), int(top), int(left + 0.7 * image.width), int(top + 0.7 * image.height))
        piece = image.resize((width, height), box=box)
        piece.save(folder / f"{number:05}.jpg", quality=90)


@lru_cache(maxsize=256)
def _pixels(index: int, size: int) -> Tensor:
    scene, again = index % len(SCENES), index // len(SCENES)
    cut = min(again * 0.03, 0.4)
    return _cut(scene, (cut, cut, 1 - cut, 1 - cut), again % 2 == 1, size)


def _cut(scene: int, box: tuple[float, float, float, float], mirrored: bool, size: int) -> Tensor:
    """A box of a photograph, its edges as fractions of width and height: left, top, right, bottom."""
    import numpy as np
    from PIL import Image, ImageOps

    image = _photograph(scene)
    edges = zip(box, image.size * 2, strict=True)
    left, top, right, bottom = (int(fraction * extent) for fraction, extent in edges)
    image = image.crop((left, top, right, bottom))
    if mirrored:
        image = ImageOps.mirror(image)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return ((pixels - 0.5) / 0.5).contiguous()


def _photograph(scene: int) -> Any:
    from PIL import Image

    with Image.open(_locate(SCENES[scene])) as file:
        return file.convert("RGB")


def _locate(scene: Scene) -> Path:
    spec = find_spec(scene.package)
    project = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[scene.package]
    if spec is None or spec.origin is None:
        raise InputError(
            f"the benchmark's photographs ship with {project}, which is not installed; "
            f"install it with: pip install {project}"
        )
    path = Path(spec.origin).parent / scene.file
    if not path.is_file():
        raise InputError(
            f"expected the photograph {scene.file} in {project}, but this version does not ship it; "
            "install scikit-image 0.26 and scikit-learn 1.7 or similar"
        )
    return path
