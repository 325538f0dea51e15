"""Views of an image: cut, mirrored and coloured as asked, by the sample's own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit3_fast.data import Augment
from beit3_fast.data.masking import sample_generator
from beit3_fast.data.rand_augment import CHANGES, Change
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


def magnitudes(name: str, sign: float = 1.0) -> list[np.ndarray]:
    return [np.asarray(CHANGES[name](ramp(), m, sign)).astype(int) for m in (0.0, 1.0)]


def test_randaugment_draws_its_operations_at_equal_chance() -> None:
    seen: dict[str, int] = dict.fromkeys(CHANGES, 0)

    def noted(name: str) -> Change:
        def change(image: Image.Image, magnitude: float, sign: float) -> Image.Image:
            assert (magnitude, abs(sign)) == (0.4, 1)
            seen[name] += 1
            return image

        return change

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setitem(CHANGES, name, noted(name))
        views(Augment(randaugment=3, magnitude=0.4), 2000)
    # 2000 views, 3 draws of 10, half of them applied
    assert all(240 < count < 360 for count in seen.values()), seen


def test_randaugment_moves_pixels_as_far_as_the_official_recipe() -> None:
    plain = np.asarray(ramp()).astype(int)
    for name, axis, channel in (("translate_x", 1, 0), ("translate_y", 0, 1)):
        for sign in (1.0, -1.0):
            still, moved = (np.asarray(CHANGES[name](ramp(), m, sign)) for m in (0.0, 1.0))
            assert np.array_equal(still, plain)
            slope = (4, 6)[channel]
            shift = sign * plain.shape[axis] * 10 / 480 * slope
            assert moved[20, 30, channel] == pytest.approx(plain[20, 30, channel] + shift, abs=1)
            edge = moved[:, -1 if sign > 0 else 0] if axis else moved[-1 if sign > 0 else 0]
            assert (edge == 128).all()
    for name, channel in (("shear_x", 0), ("shear_y", 1)):
        still, moved = magnitudes(name)
        assert np.array_equal(still, plain)
        # x grows by 0.3 y, or y by 0.3 x
        shift = (0.3 * 10.5 * 4, 0.3 * 20.5 * 6)[channel]
        assert moved[10, 20, channel] == pytest.approx(plain[10, 20, channel] + shift, abs=2)
    still, turned = magnitudes("rotate")
    assert np.array_equal(still, plain)
    assert (turned[0, 0] == 128).all()
    # 30 degrees: to the right, red grows by cos 30 of what it did
    assert turned[20, 40, 0] - turned[20, 20, 0] == pytest.approx(80 * np.cos(np.pi / 6), abs=3)
    assert not np.array_equal(turned, magnitudes("rotate", -1.0)[1])


def test_randaugment_changes_tones() -> None:
    dark, bright = magnitudes("brightness")
    plain = np.asarray(ramp()).astype(int)
    assert abs(dark - plain * 0.1).max() <= 1
    assert abs(bright - np.minimum(plain * 1.9, 255)).max() <= 1
    assert np.array_equal(magnitudes("identity")[1], plain)
    stretched = np.asarray(CHANGES["autocontrast"](ramp(), 0.7, 1.0))
    assert stretched[:, :, 0].max() == 255
    levels = np.bincount(np.asarray(CHANGES["equalize"](ramp(), 0.7, 1.0))[:, :, 0].ravel())
    assert len(levels) == 256
    edge = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, 1)[..., None].repeat(3, 2))
    edge = edge.resize((16, 16), Image.Resampling.BILINEAR)
    steep = [
        np.abs(np.diff(np.asarray(CHANGES["sharpness"](edge, m, 1.0)).astype(int)[8, :, 0])).max()
        for m in (0.0, 0.5, 1.0)
    ]
    assert steep[0] < steep[1] <= steep[2]


def test_randaugment_is_drawn_by_the_generator() -> None:
    once, again = (views(Augment(randaugment=2), 50) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    changed = [not np.array_equal(view, ramp()) for view in once]
    assert 0.3 < np.mean(changed) < 0.9


@pytest.mark.parametrize("operations", [-1, 1.0, True, "2"])
def test_a_number_of_operations_that_makes_no_sense(operations: Any) -> None:
    with pytest.raises(ConfigError, match="number of operations, 0 or more"):
        Augment(randaugment=operations)


@pytest.mark.parametrize(
    "changes", [{"magnitude": 7}, {"crop": 1.5}, {"flip": -0.1}, {"jitter": "0.4"}]
)
def test_values_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be a number in \[0, 1\]"):
        Augment(**changes)
