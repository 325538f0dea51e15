"""Images that stay in memory: the same tensors, read once, no more of them than were asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit3_fast.data import Augment, Processor
from beit3_fast.data.views import Views
from beit3_fast.errors import ConfigError, InputError


def luck() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    for n in range(3):
        Image.new("RGB", (20, 20), (40 * n,) * 3).save(tmp_path / f"{n}.png")
    return [str(tmp_path / f"{n}.png") for n in range(3)]


def test_what_is_kept_is_not_read_again(images: list[str]) -> None:
    views, fresh = Views(Processor(image_size=8), keep=2), Views(Processor(image_size=8))
    first = [views(path, luck) for path in images]
    for path, image in zip(images, first, strict=True):
        assert torch.equal(image, fresh(path, luck))
        Path(path).unlink()
    assert torch.equal(views(images[1], luck), first[1])
    with pytest.raises(InputError, match=r"2\.png"):
        views(images[2], luck)


def test_views_change_only_where_there_is_luck(images: list[str]) -> None:
    views = Views(Processor(image_size=8), Augment(jitter=0.9))
    plain = Views(Processor(image_size=8))(images[2])
    assert torch.equal(views(images[2]), plain)
    assert not torch.equal(views(images[2], luck), plain)


@pytest.mark.parametrize(
    ("augment", "keep", "said"),
    [(None, -1, "-1"), (None, True, "True"), (Augment(flip=0.5), 1, "augment")],
)
def test_what_cannot_be_kept(augment: Augment | None, keep: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Views(Processor(image_size=8), augment, keep)
