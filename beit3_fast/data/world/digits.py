"""Real images with captions: the 1,797 handwritten digits that scikit-learn brings (UCI, 8 x 8 pixels), in the official form.

=====================================  ================================================
images/digits/SPLIT/NUMBER.png         the digits, light on dark, as large as the scenes
digits_retrieval.SPLIT.jsonl           image and caption, ``CAPTIONS`` to an image
digits.{train,val}.index.jsonl         image and class, the digit
=====================================  ================================================
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from beit3_fast.data.masking import check_seed, sample_generator, sample_order
from beit3_fast.data.tokenizer import Tokenizer
from beit3_fast.data.world.folder import check_pixels, write_lines
from beit3_fast.errors import ConfigError

CAPTIONS = 2
HELD_OUT = 200
"""Digits for validation, and as many for the test."""

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MANNERS = (
    "a handwritten {}",
    "the number {} which is written by hand",
    "there is a white {} on night",
)

_ORDER, _SAID = range(2)
_BRIGHTEST = 16


def write_digits(folder: str | PathLike[str], pixels: int = 64, seed: int = 0) -> int:
    """Write the digits into a world's folder, whose tokenizer the captions get; returns how many there are.

    The same files for the same seed and libraries. Old index files go first and new ones come after their pictures, so a killed
    call leaves none that names pictures of another. Raises ConfigError without scikit-learn or a world, for fewer pixels than a
    world may have, and for a seed below 0.
    """
    check_pixels(pixels)
    check_seed(seed)
    root = Path(folder)
    if not (root / "world.spm").exists():
        raise ConfigError(f"{root} holds no world, whose words the captions use; draw one first")
    images, labels = _load()
    tokenizer = Tokenizer(root / "world.spm")
    order = sample_order(len(images), seed, _ORDER)
    starts = {"val": 0, "test": HELD_OUT, "train": 2 * HELD_OUT}
    ends = {"val": HELD_OUT, "test": 2 * HELD_OUT, "train": len(images)}
    for split in starts:
        for index in (f"digits_retrieval.{split}.jsonl", f"digits.{split}.index.jsonl"):
            (root / index).unlink(missing_ok=True)
    for split, start in starts.items():
        (root / "images/digits" / split).mkdir(parents=True, exist_ok=True)
        captions: list[dict[str, Any]] = []
        classes: list[dict[str, Any]] = []
        for number, place in enumerate(order[start : ends[split]].tolist()):
            path = f"images/digits/{split}/{number:06}.png"
            _picture(images[place], pixels).save(root / path)
            label = int(labels[place])
            luck = sample_generator(seed, _SAID, place)
            for manner in luck.permutation(len(MANNERS))[:CAPTIONS].tolist():
                text = tokenizer.encode(MANNERS[manner].format(WORDS[label]))
                captions.append({"image_path": path, "text_segment": text, "image_id": number})
            classes.append({"image_path": path, "label": label})
        write_lines(root / f"digits_retrieval.{split}.jsonl", captions)
        if split != "test":
            write_lines(root / f"digits.{split}.index.jsonl", classes)
    return len(images)


def _load() -> tuple[np.ndarray, np.ndarray]:
    """float [N, 8, 8] from 0 to 16, and int [N]."""
    try:
        from sklearn.datasets import load_digits
    except Exception as error:
        raise ConfigError(
            f"the handwritten digits come with scikit-learn, which does not import ({error}); pip install scikit-learn"
        ) from error
    found = load_digits()
    return found.images, found.target


def _picture(digit: np.ndarray, pixels: int) -> Any:
    from PIL import Image

    grey = np.rint(digit * (255 / _BRIGHTEST)).astype(np.uint8)
    return Image.fromarray(grey).resize((pixels, pixels), Image.Resampling.BICUBIC).convert("RGB")
