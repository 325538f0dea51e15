"""Both official presets against torchvision on real photographs, and every kind of source."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crafted import encoded, pixels
from PIL import Image, ImageFile

from beit3_fast.data import images
from beit3_fast.data.images import MAX_PIXELS, load_image, preprocess_image
from beit3_fast.data.presets import PRESETS, ImagePreset
from beit3_fast.errors import ConfigError

PHOTOS = ("chelsea", "coffee", "china", "flower", "coins")
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class TestPresets:
    def test_official(self) -> None:
        assert PRESETS["square"] == ImagePreset(
            "square", "squash", 1.0, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (255, 255, 255)
        )
        assert PRESETS["imagenet"] == ImagePreset("imagenet", "crop", 1.0, "bicubic", **IMAGENET)

    @pytest.mark.parametrize("name", PRESETS)
    def test_travels_as_json(self, name: str) -> None:
        preset = PRESETS[name]
        again = ImagePreset.from_dict(json.loads(json.dumps(preset.to_dict())))
        assert again == preset
        assert hash(again) == hash(preset)
        assert ImagePreset.get(preset.to_dict()) == preset

    @pytest.mark.parametrize(
        "wrong",
        [
            {"mean": (0.5, 0.5)},
            {"mean": 0.5},
            {"mean": (float("nan"), 0, 0)},
            {"std": (0.5, 0.0, 0.5)},
            {"std": ("a", "b", "c")},
            {"background": (255, 255, 256)},
            {"background": (0.5, 0.5, 0.5)},
            {"resize": "stretch"},
            {"interpolation": "nearest"},
            {"crop_pct": 0.0},
            {"crop_pct": 1.5},
            {"crop_pct": "1"},
            {"name": None},
            {"size": 224},
        ],
        ids=str,
    )
    def test_contradictions(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ImagePreset.from_dict(wrong)

    @pytest.mark.parametrize("preset", ["inception", None, 5, ["square"]], ids=str)
    def test_unknown(self, preset: Any) -> None:
        with pytest.raises(ConfigError, match="square"):
            preprocess_image(np.zeros((4, 4, 3), np.uint8), 8, preset)

    @pytest.mark.parametrize(
        "size", [0, -1, 1.5, "224", None, True, (224,), (224, 0), (1, 2, 3)], ids=str
    )
    def test_wrong_size(self, size: Any) -> None:
        with pytest.raises(ConfigError, match="image_size"):
            preprocess_image(np.zeros((4, 4, 3), np.uint8), size)


class TestAgainstTorchvision:
    """Bit for bit: the same resampling, the same rounding of sizes, the same order of operations."""

    @staticmethod
    def official(transforms: Any, name: str, size: Any, crop_pct: float = 1.0) -> Any:
        bicubic = transforms.InterpolationMode.BICUBIC
        if name == "square":
            size = (size, size) if isinstance(size, int) else size
            steps = [transforms.Resize(size, interpolation=bicubic)]
            values = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        else:
            steps = [
                transforms.Resize(int(size / crop_pct), interpolation=bicubic),
                transforms.CenterCrop(size),
            ]
            values = IMAGENET
        return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(**values)])

    @pytest.mark.parametrize("size", [16, 33, 224, 480])
    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("photo", PHOTOS)
    def test_photographs(
        self, transforms: Any, photos: dict[str, np.ndarray], photo: str, preset: str, size: int
    ) -> None:
        image = Image.fromarray(photos[photo])
        expected = self.official(transforms, preset, size)(image.convert("RGB"))
        result = preprocess_image(image, size, preset)
        assert result.shape == (3, size, size)
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        assert torch.equal(result, expected)

    @pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95])
    def test_crop_pct(
        self, transforms: Any, photos: dict[str, np.ndarray], crop_pct: float
    ) -> None:
        preset = ImagePreset.from_dict({**PRESETS["imagenet"].to_dict(), "crop_pct": crop_pct})
        image = Image.fromarray(photos["coffee"])
        expected = self.official(transforms, "imagenet", 224, crop_pct)(image)
        assert torch.equal(preprocess_image(image, 224, preset), expected)

    def test_oblong_squash(self, transforms: Any, photos: dict[str, np.ndarray]) -> None:
        image = Image.fromarray(photos["china"])
        expected = self.official(transforms, "square", (160, 224))(image)
        assert torch.equal(preprocess_image(image, (160, 224)), expected)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_every_small_shape(self, transforms: Any, small: np.ndarray, preset: str) -> None:
        official = self.official(transforms, preset, 8)
        for height in range(1, 14):
            for width in range(1, 14):
                image = Image.fromarray(small[:height, :width])
                assert torch.equal(preprocess_image(image, 8, preset), official(image)), (
                    height,
                    width,
                )

    def test_encoded_files(self, transforms: Any, photos: dict[str, np.ndarray]) -> None:
        for format in ("PNG", "JPEG", "WEBP"):
            content = encoded(Image.fromarray(photos["flower"]), format)
            image = Image.open(io.BytesIO(content)).convert("RGB")
            expected = self.official(transforms, "imagenet", 96)(image)
            assert torch.equal(preprocess_image(content, 96, "imagenet"), expected)


class TestGeometry:
    @pytest.mark.parametrize("size", [(48, 96), (96, 48)])
    def test_oblong_crop_covers_the_target(
        self, photos: dict[str, np.ndarray], size: tuple[int, int]
    ) -> None:
        image = Image.fromarray(photos["chelsea"])
        result = preprocess_image(image, size, "imagenet")
        assert result.shape == (3, *size)
        # The same as fitting by hand: the whole of one side and the middle of the other.
        scale = max(size[0] / image.height, size[1] / image.width)
        fitted = image.resize(
            (max(size[1], int(image.width * scale)), max(size[0], int(image.height * scale))),
            Image.Resampling.BICUBIC,
        )
        left, top = round((fitted.width - size[1]) / 2), round((fitted.height - size[0]) / 2)
        by_hand = fitted.crop((left, top, left + size[1], top + size[0]))
        plain = ImagePreset(name="plain", mean=(0, 0, 0), std=(1, 1, 1))
        values = (torch.tensor(IMAGENET["std"]), torch.tensor(IMAGENET["mean"]))
        back = result * values[0].view(3, 1, 1) + values[1].view(3, 1, 1)
        assert torch.allclose(back, preprocess_image(by_hand, size, plain), atol=1e-6)

    def test_crop_before_resampling_is_the_same_picture(
        self, photos: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for photo in PHOTOS:
            image = Image.fromarray(photos[photo]).convert("RGB")
            whole = images._cover(image, 64, 64, 1.0, Image.Resampling.BICUBIC)
            with monkeypatch.context() as patch:
                patch.setattr(images, "_MAX_OVERHANG", 0)
                cut = images._cover(image, 64, 64, 1.0, Image.Resampling.BICUBIC)
            difference = np.abs(np.asarray(whole).astype(int) - np.asarray(cut))
            # Box corners are rounded to single precision: one level now and then.
            assert difference.max() <= 1

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (2, 3000), (1, 7)])
    def test_extreme_shapes(self, shape: tuple[int, int], preset: str) -> None:
        image = np.full((*shape, 3), (10, 128, 250), np.uint8)
        image[: shape[0] // 2, : shape[1] // 2] = (10, 128, 250)
        result = preprocess_image(image, 224, preset)
        assert result.shape == (3, 224, 224)
        chosen = PRESETS[preset]
        for channel, value in enumerate((10, 128, 250)):
            expected = (value / 255 - chosen.mean[channel]) / chosen.std[channel]
            assert torch.allclose(result[channel], torch.tensor(expected), atol=1e-6)

    def test_the_centre_of_a_thin_image(self) -> None:
        image = np.zeros((1, 20_001, 3), np.uint8)
        image[0, 9_990:10_011] = 255
        assert preprocess_image(image, 32, "imagenet").min() > 2


class TestSources:
    def test_all_kinds_give_the_same(self, small: np.ndarray, tmp_path: Path) -> None:
        image = Image.fromarray(small)
        content = encoded(image)
        path = tmp_path / "photo.png"
        path.write_bytes(content)
        (tmp_path / "photo.jpg").write_bytes(content)
        tensor = torch.from_numpy(small).permute(2, 0, 1)
        with open(path, "rb") as file:
            file.read(10)
            sources = [
                path,
                str(path),
                tmp_path / "photo.jpg",
                content,
                bytearray(content),
                memoryview(content),
                io.BytesIO(content),
                file,
                image,
                Image.open(path),
                small,
                small.astype(np.uint16) * 256,
                small.astype(np.float64) / 255,
                small.astype(np.float32) / 255,
                tensor,
                tensor.contiguous(),
                tensor / 255,
                (tensor / 255).requires_grad_(),
                (tensor / 255).double(),
                np.asfortranarray(small),
                small[::-1][::-1],
            ]
            for source in sources:
                assert np.array_equal(pixels(source), small), type(source)
            # The caller's file stays open.
            file.seek(0)
            assert file.read(4) == b"\x89PNG"

    def test_half_precision_tensors_round_trip(self) -> None:
        levels = torch.arange(256).view(1, 16, 16)
        expected = levels[0].numpy()
        assert np.array_equal(pixels(levels.half() / 255)[..., 0], expected)

    def test_grey_arrays(self, small: np.ndarray) -> None:
        grey = small[:, :, 0].copy()
        expected = np.repeat(grey[:, :, None], 3, axis=2)
        for source in (
            grey,
            grey[:, :, None],
            torch.from_numpy(grey),
            torch.from_numpy(grey)[None],
        ):
            assert np.array_equal(pixels(source), expected)

    def test_rgba_arrays(self, small: np.ndarray) -> None:
        alpha = np.full((*small.shape[:2], 1), 255, np.uint8)
        alpha[:20] = 0
        rgba = np.concatenate([small, alpha], axis=2)
        expected = small.copy()
        expected[:20] = 255
        assert np.array_equal(pixels(rgba), expected)
        assert np.array_equal(pixels(torch.from_numpy(rgba).permute(2, 0, 1)), expected)

    def test_sources_are_left_alone(self, small: np.ndarray) -> None:
        before = small.copy()
        image = Image.fromarray(small)
        tensor = torch.from_numpy(small.copy()).permute(2, 0, 1)
        for source in (small, image, tensor):
            preprocess_image(source, 16, "imagenet")
        assert np.array_equal(small, before)
        assert np.array_equal(np.asarray(image), before)
        assert np.array_equal(tensor.permute(1, 2, 0).numpy(), before)

    def test_a_path_is_usable_after_loading(self, small: np.ndarray, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(encoded(Image.fromarray(small)))
        image = load_image(path)
        path.unlink()
        assert np.array_equal(np.asarray(image.resize((60, 40))), small)

    def test_bytes_paths_are_not_guessed(self, tmp_path: Path) -> None:
        # bytes are always the content of a file, as documented.
        path = tmp_path / "a.png"
        path.write_bytes(encoded(Image.new("RGB", (2, 2))))
        with pytest.raises(ValueError, match="begins with"):
            load_image(bytes(path))


def test_pillow_is_left_as_it_was(small: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    # Values that are nobody's default: an earlier test cannot have left them behind.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 123_456_789)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    for limit in (MAX_PIXELS, 10**9, None, 2400):
        preprocess_image(encoded(Image.fromarray(small)), 16, max_pixels=limit)
    assert Image.MAX_IMAGE_PIXELS == 123_456_789
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
