"""The defined result of every image that is not 8-bit RGB the right way up."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from crafted import encoded, pixels, png
from PIL import Image

from beit3_fast.data import ImagePreset, preprocess_image

# What each EXIF orientation does to the upright array on its way into the file.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


class TestDefinedResults:
    @pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
    @pytest.mark.parametrize("orientation", STORED)
    def test_exif_rotation(self, small: np.ndarray, orientation: int, format: str) -> None:
        stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](small)))
        exif = Image.Exif()
        exif[0x0112] = orientation
        options: dict[str, dict[str, Any]]
        options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
        content = encoded(stored, format, exif=exif, **options.get(format, {}))
        for source in (content, Image.open(io.BytesIO(content))):
            result = pixels(source).astype(int)
            assert result.shape == small.shape
            assert np.abs(result - small).max() <= (8 if format == "JPEG" else 0)

    @pytest.mark.parametrize("orientation", [0, 9, 65535, "six", (6, 6), b"6", 6.5])
    def test_meaningless_orientation(self, small: np.ndarray, orientation: Any) -> None:
        image = Image.fromarray(small)
        image.getexif()[0x0112] = orientation
        assert np.array_equal(pixels(image), small)

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    @pytest.mark.parametrize(
        "exif",
        [b"Exif\0\0", b"Exif\0\0MM\0\x2a\xff\xff\xff\xff", b"Exif\0\0junkjunkjunk", b"\xff" * 64],
    )
    def test_broken_exif(self, small: np.ndarray, exif: bytes) -> None:
        assert np.array_equal(pixels(encoded(Image.fromarray(small), exif=exif)), small)

    def test_cmyk(self, small: np.ndarray) -> None:
        image = Image.fromarray(small).convert("CMYK")
        assert np.array_equal(pixels(encoded(image, "TIFF")), small)
        result = pixels(encoded(image, "JPEG", quality=100)).astype(int)
        assert np.abs(result - small).max() <= 24

    @pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
    def test_sixteen_bits_grey(self, format: str) -> None:
        values = (np.arange(32 * 48, dtype=np.uint16) * 42).reshape(32, 48)
        expected = np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        content = encoded(Image.fromarray(values), format)
        assert np.array_equal(pixels(content), expected)
        assert np.array_equal(pixels(values), expected)

    def test_sixteen_bits_big_endian(self) -> None:
        values = (np.arange(12, dtype=np.uint16) * 5000).reshape(3, 4)
        image = Image.frombytes("I;16B", (4, 3), values.astype(">u2").tobytes())
        assert np.array_equal(pixels(image)[..., 0], values >> 8)
        for source in (values.astype(">u2"), np.dstack([values.astype(">u2")] * 3)):
            assert np.array_equal(pixels(source)[..., 0], values >> 8)
        units = (values / 65535).astype(">f4")
        assert np.array_equal(pixels(units), pixels(units.astype(np.float32)))

    def test_sixteen_bits_colour_keeps_the_high_byte_too(self) -> None:
        # Pillow cannot write one, so the file is made by hand: two pixels of 16-bit RGB.
        row = b"\0" + bytes([0x12, 0xFF, 0x80, 0x00, 0xFE, 0x01]) + bytes([0xFF] * 6)
        content = png(2, 1, 16, 2, row)
        assert pixels(content).tolist() == [[[0x12, 0x80, 0xFE], [255, 255, 255]]]

    def test_integer_mode(self) -> None:
        image = Image.fromarray(np.array([[0, 255, 256, 65535]], np.int32))
        assert image.mode == "I"
        assert pixels(image)[0, :, 0].tolist() == [0, 0, 1, 255]

    def test_float_mode(self) -> None:
        image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
        assert image.mode == "F"
        assert pixels(image)[0, :, 0].tolist() == [0, 128, 255]
        assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]

    @pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 20, 30)])
    def test_rgba_over_the_background(
        self, small: np.ndarray, background: tuple[int, int, int]
    ) -> None:
        alpha = np.zeros(small.shape[:2], np.uint8)
        alpha[:10] = 255
        alpha[10:20] = 128
        image = Image.fromarray(np.dstack([small, alpha]))
        result = pixels(encoded(image), background=background).astype(float)
        share = alpha[:, :, None] / 255
        assert np.abs(result - (small * share + np.array(background) * (1 - share))).max() <= 0.51

    def test_the_preset_has_the_background(self) -> None:
        clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
        assert torch.equal(preprocess_image(clear, 4), torch.ones(3, 4, 4))
        black = ImagePreset(name="black", background=(0, 0, 0))
        assert torch.equal(preprocess_image(clear, 4, black), -torch.ones(3, 4, 4))

    def test_grey_with_alpha(self) -> None:
        image = Image.new("LA", (3, 2), (40, 0))
        image.putpixel((0, 0), (40, 255))
        expected = [40, 255, 255]
        assert pixels(encoded(image))[0, :, 0].tolist() == expected
        assert pixels(image)[0, :, 0].tolist() == expected
        assert pixels(image.convert("La"))[0, :, 0].tolist() == expected

    def test_premultiplied(self) -> None:
        image = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
        image.putpixel((1, 0), (200, 100, 50, 0))
        assert pixels(image.convert("RGBa")).tolist() == [[[200, 100, 50], [255, 255, 255]]]

    def test_palette(self, small: np.ndarray) -> None:
        image = Image.fromarray(small).quantize(16)
        expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(pixels(encoded(image)), expected)
        assert np.array_equal(pixels(encoded(image, "GIF")), expected)

    @pytest.mark.parametrize("format", ["PNG", "GIF"])
    def test_palette_with_a_transparent_entry(self, format: str) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([10, 20, 30, 200, 100, 50, 7, 7, 7])
        image.putdata([0, 1, 2])
        result = pixels(encoded(image, format, transparency=1))
        assert result.tolist() == [[[10, 20, 30], [255, 255, 255], [7, 7, 7]]]

    def test_palette_with_an_alpha_table(self) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 200, 100, 50])
        image.putdata([0, 1])
        result = pixels(encoded(image, transparency=bytes([128, 255])))
        assert result.tolist() == [[[127, 127, 127], [200, 100, 50]]]

    def test_palette_with_alpha_channel(self) -> None:
        image = Image.new("RGBA", (2, 1), (200, 100, 50, 0)).convert("PA")
        assert pixels(image).tolist() == [[[255] * 3] * 2]

    def test_transparent_colour(self) -> None:
        image = Image.new("RGB", (2, 1), (1, 2, 3))
        image.putpixel((1, 0), (4, 5, 6))
        content = encoded(image, transparency=(1, 2, 3))
        assert pixels(content).tolist() == [[[255, 255, 255], [4, 5, 6]]]

    @pytest.mark.parametrize("value", [0x1234, 0x00C8, 0])
    def test_transparent_colour_of_16_bits(self, value: int) -> None:
        # one pixel of the colour, one that differs in the low byte, one whose high byte is the colour's low byte
        values = [value, value ^ 1, (value & 0xFF) << 8 | 0x77]
        grey = b"\0" + b"".join(v.to_bytes(2, "big") for v in values)
        colour = b"\0" + b"".join(v.to_bytes(2, "big") * 3 for v in values)
        one = value.to_bytes(2, "big")
        result = pixels(png(3, 1, 16, 0, grey, one), background=(1, 2, 3)).tolist()[0]
        assert result == [[1, 2, 3], [value >> 8] * 3, [values[2] >> 8] * 3]
        # Pillow keeps eight bits of a colour, and so does the comparison
        same = values[2] >> 8 == value >> 8
        result = pixels(png(3, 1, 16, 2, colour, one * 3), background=(1, 2, 3)).tolist()[0]
        assert result == [[1, 2, 3], [1, 2, 3], [1, 2, 3] if same else [values[2] >> 8] * 3]

    def test_a_pillow_image_of_16_bits_keeps_its_transparent_colour(self) -> None:
        content = png(1, 1, 16, 2, b"\0" + b"\x12\x34" * 3, b"\x12\x34" * 3)
        with Image.open(io.BytesIO(content)) as image:
            for _ in range(2):
                assert pixels(image).tolist() == [[[255] * 3]]
            assert image.info["transparency"] == (0x1234,) * 3

    def test_one_bit(self) -> None:
        image = Image.new("1", (3, 1))
        image.putpixel((1, 0), 1)
        for source in (image, encoded(image), encoded(image, "TIFF"), encoded(image, "PPM")):
            assert pixels(source)[0, :, 0].tolist() == [0, 255, 0]

    @pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBX"])
    def test_other_colour_spaces(self, small: np.ndarray, mode: str) -> None:
        image = Image.fromarray(small).convert(mode)
        assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_animation_gives_its_first_frame(self, format: str) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        options = {"lossless": True} if format == "WEBP" else {}
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 3
        assert (pixels(content) == (255, 0, 0)).all()

    def test_an_open_animation_gives_its_current_frame(self) -> None:
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
        image = Image.open(
            io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
        )
        image.seek(2)
        assert (pixels(image) == (0, 0, 255)).all()
        assert image.tell() == 2

    @pytest.mark.parametrize("format", ["BMP", "PPM", "JPEG2000", "AVIF", "WEBP", "TIFF", "GIF"])
    def test_formats(self, small: np.ndarray, format: str) -> None:
        Image.init()
        if format not in Image.SAVE:
            pytest.skip(f"this Pillow cannot write {format}")
        result = pixels(encoded(Image.fromarray(small), format)).astype(int)
        assert result.shape == small.shape
        assert np.abs(result - small).mean() < 8

    def test_several_pictures_in_one_jpeg(self, small: np.ndarray) -> None:
        first, second = Image.fromarray(small), Image.new("RGB", (60, 40))
        content = encoded(first, "MPO", save_all=True, append_images=[second], quality=100)
        assert np.abs(pixels(content).astype(int) - small).mean() < 2

    def test_damage_after_the_picture_is_no_damage(self, small: np.ndarray) -> None:
        content = encoded(Image.fromarray(small), "PNG")
        assert np.array_equal(pixels(content + b"trailing" * 100), small)

    @pytest.mark.parametrize(("format", "missing"), [("PNG", 12), ("PNG", 20), ("GIF", 1)])
    def test_an_end_mark_that_is_missing_is_no_damage(
        self, small: np.ndarray, format: str, missing: int
    ) -> None:
        """PNG: the last chunk, and the checksum of the pixels before it; all pixels are there."""
        content = encoded(Image.fromarray(small), format)
        assert np.array_equal(pixels(content[:-missing]), pixels(content))

    def test_floats_round_to_the_nearest_level(self) -> None:
        values = np.array([[0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0]])
        assert pixels(values)[0, :, 0].tolist() == [0, 0, 1, 255, 255]
