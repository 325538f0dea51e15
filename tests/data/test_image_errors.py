"""Images that cannot be used: each gives an InputError that says why, and none is decoded beyond the limit."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crafted import encoded, png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from beit3_fast.data import Processor, load_image, preprocess_image
from beit3_fast.data.images import FORMATS
from beit3_fast.errors import ConfigError, InputError

ROOT = Path(__file__).resolve().parents[2]
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
NOISE = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)


def noise(format: str, **options: Any) -> bytes:
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {format}")
    return encoded(Image.fromarray(NOISE), format, **options)


class TestNoImages:
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"\0", "not an image"),
            (b"hello", "not an image"),
            (b"\0" * 10_000, "not an image"),
            (b"\x8f\x13\xf2" * 999, "not an image"),
            (SVG, "begins with b'<svg"),
            (b"<!DOCTYPE html><html>404</html>", "begins with b'<!DOCTYPE"),
            (b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version"),
            (b"%PDF-1.7\n%\xe2\xe3", "not an image"),
            (b"PK\x03\x04" + bytes(60), "not an image"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
            (b"\0\0\0\x18ftypmp42" + bytes(40), "not an image"),
            (b"\xff\xd8\xff", "not an image|cannot be read|damaged"),
            (b"\x89PNG\r\n\x1a\n", "not an image|cannot be read|damaged"),
            (b"GIF89a", "not an image|cannot be read|damaged"),
            (b"RIFF\0\0\0\0WEBP", "not an image|cannot be read|damaged"),
            (b"II*\0\x08\0\0\0", "not an image|cannot be read|damaged"),
            (b"P6\n4 4\n255\n", "truncated|damaged"),
            (b"P6\nx y\n255\n", "not an image|cannot be read"),
            (png(0, 5, 8, 2, b""), "empty|not an image|cannot be read"),
            (png(4, 4, 8, 2, b"\0"), "truncated|damaged"),
            (png(4, 4, 7, 9, b"\0"), "not an image|cannot be read"),
        ],
        ids=range(22),
    )
    def test_content(self, content: bytes, message: str, tmp_path: Path) -> None:
        path = tmp_path / "photo.jpg"
        path.write_bytes(content)
        for source in (content, path):
            with pytest.raises(InputError, match=message):
                load_image(source)

    def test_formats_that_run_programs_or_lie_about_size(self) -> None:
        assert not {"EPS", "ICO", "WMF", "PSD", "FITS"} & set(FORMATS)
        with pytest.raises(InputError, match="supported format"):
            load_image(noise("ICO"))

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("nowhere/photo.jpg", "cannot be opened.*No such file"),
            ("https://example.com/photo.jpg", "fetch it first"),
            ("a\0b.jpg", "cannot be opened"),
            ("", "cannot be opened"),
            ("x" * 5000, "cannot be opened"),
            (None, "expected an image"),
            (5, "expected an image"),
            ({"path": "a.jpg"}, "expected an image"),
            (["a.jpg"], "expected an image"),
        ],
        ids=repr,
    )
    def test_no_source(self, source: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_image(source)

    def test_not_a_regular_file(self, tmp_path: Path) -> None:
        fifo = tmp_path / "fifo.jpg"
        os.mkfifo(fifo)
        for path in (fifo, "/dev/zero"):
            with pytest.raises(InputError, match="not a regular file"):
                load_image(path)
        with pytest.raises(InputError, match="is a folder; name the image files in it"):
            load_image(tmp_path)

    def test_file_objects(self, tmp_path: Path) -> None:
        path = tmp_path / "photo.png"
        path.write_bytes(noise("PNG"))
        with (
            open(path, encoding="latin-1") as text,
            pytest.raises(InputError, match="cannot be read"),
        ):
            load_image(text)
        with open(path, "rb") as closed:
            pass
        with pytest.raises(InputError, match="closed file"):
            load_image(closed)
        reader, writer = os.pipe()
        os.close(writer)
        with open(reader, "rb") as pipe, pytest.raises(InputError, match="cannot be read"):
            load_image(pipe)

    def test_an_open_image_whose_file_is_gone(self, tmp_path: Path) -> None:
        path = tmp_path / "photo.png"
        path.write_bytes(noise("PNG"))
        image = Image.open(path)
        image.close()
        with pytest.raises(InputError, match="damaged"):
            load_image(image)


class TestDamage:
    @pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
    @pytest.mark.parametrize("format", FORMATS)
    def test_truncated(self, format: str, share: float) -> None:
        content = noise(format)
        with pytest.raises(InputError, match=r"truncated|damaged|cannot be read|not an image"):
            load_image(content[: int(len(content) * share)])

    def test_bad_checksum(self) -> None:
        content = bytearray(noise("PNG"))
        content[20] ^= 1
        with pytest.raises(InputError, match=r"cannot be read|not an image|damaged"):
            load_image(bytes(content))

    @given(data=st.data())
    @settings(max_examples=150, deadline=None)
    def test_any_damage(self, data: st.DataObject) -> None:
        """A picture of the right kind or an InputError, whatever happens to a file."""
        format = data.draw(st.sampled_from(("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")))
        content = bytearray(_SMALL[format])
        for _ in range(data.draw(st.integers(1, 6))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] = data.draw(st.integers(0, 255))
        del content[data.draw(st.integers(len(content) // 2, len(content))) :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = load_image(bytes(content), max_pixels=10**6)
            except InputError:
                return
        assert image.mode == "RGB"
        assert image.width * image.height <= 10**6


_SMALL = {
    format: encoded(Image.fromarray(NOISE[:12, :16]), format)
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
}


class TestArrays:
    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((0, 4, 3), np.uint8), "empty"),
            (np.zeros((4, 0), np.uint8), "empty"),
            (np.zeros(4, np.uint8), r"\[H, W"),
            (np.zeros((), np.uint8), r"\[H, W"),
            (np.zeros((2, 4, 4, 3), np.uint8), r"\[H, W"),
            (np.zeros((3, 8, 8), np.uint8), "channels first"),
            (np.zeros((8, 8, 2), np.uint8), r"\[H, W"),
            (np.zeros((8, 8, 5), np.uint8), r"\[H, W"),
            (np.full((4, 4, 3), np.nan), r"\[0, 1\]"),
            (np.array([[0.5, np.nan]]), r"\[0, 1\]"),
            (np.array([[0.5, np.inf]]), r"\[0, 1\]"),
            (np.array([[0.5, 1.001]]), "divide by 255"),
            (np.array([[-0.001, 0.5]]), "not normalised"),
            (np.full((4, 4), 255.0), "divide by 255"),
            (np.zeros((4, 4), np.int64), "uint8"),
            (np.zeros((4, 4), np.int8), "uint8"),
            (np.zeros((4, 4), bool), "uint8"),
            (np.zeros((4, 4), complex), "uint8"),
            (np.array([["a"]]), "uint8"),
            (np.array([[None]]), "uint8"),
        ],
        ids=range(20),
    )
    def test_numpy(self, array: np.ndarray, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_image(array)

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (torch.zeros(0, 4, dtype=torch.uint8), "empty"),
            (torch.zeros(3, 0, 4, dtype=torch.uint8), "empty"),
            (torch.zeros(4), r"\[H, W"),
            (torch.zeros(2, 3, 4, 4), r"\[H, W"),
            (torch.zeros(8, 8, 3), "permute"),
            (torch.zeros(2, 8, 8), "permute"),
            (torch.full((3, 4, 4), torch.nan), r"\[0, 1\]"),
            (torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)), "not normalised"),
            (torch.zeros(3, 4, 4, dtype=torch.int64), "uint8"),
            (torch.zeros(3, 4, 4, dtype=torch.bool), "uint8"),
            (torch.zeros(3, 4, 4, dtype=torch.complex64), "plain numbers"),
            (torch.zeros(3, 4, 4, device="meta"), "plain numbers"),
            (torch.zeros(4, 4).to_sparse(), "plain numbers"),
            (torch.quantize_per_tensor(torch.zeros(4, 4), 1.0, 0, torch.quint8), "plain numbers"),
            (torch.nested.nested_tensor([torch.zeros(4, 4)]), "plain numbers"),
        ],
        ids=range(15),
    )
    def test_torch(self, tensor: torch.Tensor, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_image(tensor)

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (Image.new("RGB", (0, 5)), "empty"),
            (Image.new("L", (5, 0)), "empty"),
            (Image.fromarray(np.array([[0, 65536]], np.int32)), "65535"),
            (Image.fromarray(np.array([[-1, 5]], np.int32)), "65535"),
            (Image.fromarray(np.array([[0, 255]], np.float32)), r"\[0, 1\]"),
            (Image.fromarray(np.array([[0, np.nan]], np.float32)), r"\[0, 1\]"),
        ],
        ids=range(6),
    )
    def test_pillow(self, image: Image.Image, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_image(image)


class TestBombs:
    # 50,000 x 50,000 pixels would be 7.5 GB as RGB; each file is a few kilobytes.
    @staticmethod
    def bombs() -> dict[str, bytes]:
        gif = bytearray(encoded(Image.new("L", (4, 4)), "GIF"))
        gif[6:10] = (65535).to_bytes(2, "little") * 2
        bmp = bytearray(encoded(Image.new("L", (4, 4)), "BMP"))
        bmp[18:26] = (50_000).to_bytes(4, "little") * 2
        return {
            "png": png(50_000, 50_000, 8, 2, bytes(10**6)),
            "wide": png(2**31 - 1, 1, 1, 0, bytes(1000)),
            "above our limit, below Pillow's": png(10_000, 10_000, 1, 0, bytes(1251 * 10_000)),
            "gif": bytes(gif),
            "bmp": bytes(bmp),
            "ppm": b"P6\n50000 50000\n255\n" + bytes(1000),
        }

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize(
        "name", ["png", "wide", "above our limit, below Pillow's", "gif", "bmp", "ppm"]
    )
    def test_refused_before_decoding(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        content = self.bombs()[name]
        assert len(content) < 20_000

        def decode(*_: Any) -> None:
            raise AssertionError("decoded")

        monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
        monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", decode)
        with pytest.raises(InputError, match="max_pixels"):
            load_image(content)

    def test_the_limit_is_exact_and_adjustable(self) -> None:
        content = noise("PNG")
        assert load_image(content, max_pixels=48 * 64).size == (48, 64)
        assert load_image(content, max_pixels=None).size == (48, 64)
        for source in (
            content,
            Image.fromarray(NOISE),
            NOISE,
            torch.from_numpy(NOISE).permute(2, 0, 1),
        ):
            with pytest.raises(
                InputError, match="48 x 64 pixels, more than the limit max_pixels = 3071"
            ):
                load_image(source, max_pixels=48 * 64 - 1)
            with pytest.raises(InputError, match="max_pixels"):
                preprocess_image(source, 8, max_pixels=48 * 64 - 1)

    @pytest.mark.parametrize("limit", ["5", 0, -1, 1.5, [5]])
    def test_limits_that_are_none(self, limit: Any) -> None:
        for call in (
            lambda: load_image(NOISE, max_pixels=limit),
            lambda: Processor(max_pixels=limit),
        ):
            with pytest.raises(ConfigError, match="max_pixels must be a positive integer or None"):
                call()

    def test_a_model_input_has_a_limit_too(self) -> None:
        for size in (10**9, (8, 16_385)):
            with pytest.raises(ConfigError, match="at most 16384"):
                preprocess_image(NOISE, size)

    def test_an_open_image_is_checked_too(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        path = tmp_path / "photo.png"
        path.write_bytes(noise("PNG"))
        with Image.open(path) as image:
            with pytest.raises(InputError, match="max_pixels"):
                load_image(image, max_pixels=100)
            # Still undecoded, and still usable.
            assert np.array_equal(np.asarray(load_image(image)), NOISE)

    def test_pillows_own_limit_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(InputError, match=r"PIL\.Image\.MAX_IMAGE_PIXELS"):
            load_image(noise("PNG"))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 64 - 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(InputError, match=r"PIL\.Image\.MAX_IMAGE_PIXELS"):
                load_image(noise("PNG"))

    def test_memory_stays_bounded(self, tmp_path: Path) -> None:
        for index, content in enumerate(self.bombs().values()):
            (tmp_path / f"{index}.bin").write_bytes(content)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _MEMORY, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        refused, grown_mib = map(int, done.stdout.split())
        assert refused == 6
        # A whole resampled strip of a thin image alone would be 17 GB, the smallest bomb decoded 12 MB a bit plane.
        assert grown_mib < 100


_MEMORY = """
import pathlib, resource, sys
import numpy as np
from PIL import Image
from beit3_fast.data import preprocess_image
from beit3_fast.errors import InputError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
preprocess_image(np.zeros((64, 64, 3), np.uint8), 224, "imagenet")
Image.init()
before, refused = peak(), 0
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        preprocess_image(path, 224)
    except InputError:
        refused += 1
for shape in ((1, 20_000, 3), (20_000, 1, 3), (1, 1_000_000, 3)):
    preprocess_image(np.zeros(shape, np.uint8), 224, "imagenet")
print(refused, peak() - before)
"""
