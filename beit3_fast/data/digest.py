"""Digests that say whether two things were made of the same."""

from __future__ import annotations

import hashlib


def digest_of(text: str) -> str:
    """SHA-256 of a text, which may hold file names that are no UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
