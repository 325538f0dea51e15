"""Image files in memory, also such as no program would write, and what is read from them."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
from PIL import Image

from beit3_fast.data import load_image


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, transparent: bytes | None = None
) -> bytes:
    """A PNG file with any header: ``rows`` is what gets compressed, filter bytes included; ``transparent`` is its tRNS."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (b"" if transparent is None else chunk(b"tRNS", transparent))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def pixels(source: Any, **options: Any) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)
