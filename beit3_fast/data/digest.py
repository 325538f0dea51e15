"""Digests that say whether two things were made of the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_CHUNK = 1 << 20


def digest_of(text: str) -> str:
    """SHA-256 of a text, which may hold file names that are no UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]], told: str = "") -> str:
    """SHA-256 of what is told and of names and values, these as float32."""
    digest = hashlib.sha256(told.encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
