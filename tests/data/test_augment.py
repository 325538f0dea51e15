"""Views of an image: cut, mirrored and coloured as asked, by the sample's own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit3_fast.data import Augment
from beit3_fast.data.masking import sample_generator
from beit3_fast.errors import ConfigError


def ramp(width: int = 60, height: int = 40) -> Image.Image:
    """Red grows to the right, green to the bottom: a pixel says where it was."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.arange(width) * 4
    pixels[:, :, 1] = np.arange(height)[:, None] * 6
    pixels[:, :, 2] = 90
    return Image.fromarray(pixels)


def views(augment: Augment, count: int = 200) -> list[Image.Image]:
    return [augment(ramp(), sample_generator(0, number)) for number in range(count)]


def test_without_options_nothing_changes() -> None:
    assert all(np.array_equal(view, ramp()) for view in views(Augment(), 5))


def test_crops_keep_their_share_and_lie_inside() -> None:
    areas, places = [], set()
    for view in views(Augment(crop=0.3)):
        pixels = np.asarray(view).astype(int)
        left, top = pixels[0, 0, 0] // 4, pixels[0, 0, 1] // 6
        expected = np.asarray(ramp().crop((left, top, left + view.width, top + view.height)))
        assert np.array_equal(pixels, expected)
        assert view.size == (60, 40) or 0.72 < view.width / view.height < 1.4
        areas.append(view.width * view.height / 2400)
        places.add((left, top))
    assert 0.28 < min(areas) < 0.35
    assert max(areas) > 0.7
    assert len(places) > 100


def test_a_thin_image_stays_whole() -> None:
    thin = Image.new("RGB", (100, 4))
    assert Augment(crop=0.9)(thin, sample_generator(0)).size == (100, 4)


def test_mirror_images_at_their_chance() -> None:
    mirrored = [bool(np.asarray(view)[0, 0, 0] > 0) for view in views(Augment(flip=0.3))]
    assert 0.2 < np.mean(mirrored) < 0.4
    flipped = np.asarray(views(Augment(flip=1.0), 1)[0])
    assert np.array_equal(flipped, np.asarray(ramp())[:, ::-1])


def test_jitter_changes_colours_within_its_bounds() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    seen = [np.asarray(Augment(jitter=0.2)(grey, sample_generator(0, n)))[0, 0] for n in range(100)]
    assert all(80 <= pixel[0] <= 120 and len(set(pixel.tolist())) == 1 for pixel in seen)
    assert len({int(pixel[0]) for pixel in seen}) > 20
    spread = [np.asarray(view).std() for view in views(Augment(jitter=0.4), 50)]
    assert min(spread) < 0.8 * np.asarray(ramp()).std() < np.asarray(ramp()).std() < max(spread)


@pytest.mark.parametrize("changes", [{"crop": 1.5}, {"flip": -0.1}, {"jitter": "0.4"}])
def test_values_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be a number in \[0, 1\]"):
        Augment(**changes)
