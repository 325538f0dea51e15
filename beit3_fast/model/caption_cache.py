"""The keys and values of one layer while captions are decoded: an image's, and behind them those of the words.

``JointCache`` holds both in one tensor, which PyTorch's attention reads; ``PackedCache`` holds those of the image in the
order in which the CPU kernels read them, once for all steps. No key of an image is copied from step to step in either.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from beit3_fast.ops import PackedKeys, cached_attention, pack_keys, reads_packed_keys


class LayerCache(Protocol):
    """What a decoder asks of the cache of a layer. ``num_samples``: images that it has room for."""

    num_samples: int

    def write_image(self, samples: slice, k: Tensor, v: Tensor) -> None:
        """Take the keys and values [S * P, C] of the P tokens of some images."""

    def write_words(self, samples: list[int], place: int, k: Tensor, v: Tensor) -> None:
        """Take those of ``n`` words a sample, [S * n, C], at the places from ``place`` on."""

    def attend(self, q: Tensor, seen: Tensor, samples: tuple[int, ...]) -> Tensor:
        """Rows q [S, n, C] to their image and to the words that ``seen`` bool [S, n, words so far] names."""

    def keep(self, samples: Tensor) -> None:
        """Hold on to the samples ``samples`` int64 only, in this order."""


def make_cache(rows: Tensor, shape: tuple[int, int, int], num_heads: int, impl: str) -> LayerCache:
    """The cache for samples, image tokens and words ``shape``, with keys and values like ``rows`` [R, C]."""
    kind = PackedCache if reads_packed_keys(rows, impl) else JointCache
    return kind(rows, shape, num_heads, impl)


class JointCache:
    """One tensor [B, P + words, C] for keys, one for values."""

    def __init__(
        self, rows: Tensor, shape: tuple[int, int, int], num_heads: int, impl: str
    ) -> None:
        self.num_samples, self.num_vision, words = shape
        self.num_heads, self.impl = num_heads, impl
        size = (self.num_samples, self.num_vision + words, rows.shape[1])
        self.k, self.v = rows.new_empty(size), rows.new_empty(size)

    def write_image(self, samples: slice, k: Tensor, v: Tensor) -> None:
        """As ``LayerCache``."""
        for cache, rows in ((self.k, k), (self.v, v)):
            cache[samples, : self.num_vision] = rows.unflatten(0, (-1, self.num_vision))

    def write_words(self, samples: list[int], place: int, k: Tensor, v: Tensor) -> None:
        """As ``LayerCache``."""
        first = self.num_vision + place
        _write(self.k, self.v, samples, first, k, v)

    def attend(self, q: Tensor, seen: Tensor, samples: tuple[int, ...]) -> Tensor:
        """As ``LayerCache``."""
        image = seen.new_ones(*seen.shape[:2], self.num_vision)
        stop = self.num_vision + seen.shape[2]
        return cached_attention(
            q,
            self.k[:, :stop],
            self.v[:, :stop],
            torch.cat([image, seen], dim=2),
            num_heads=self.num_heads,
            samples=samples,
            impl=self.impl,
        )

    def keep(self, samples: Tensor) -> None:
        """As ``LayerCache``."""
        self.k, self.v = self.k[samples], self.v[samples]
        self.num_samples = len(samples)


class PackedCache:
    """The image's packed, [B, H, L]; the words' [B, words, C]."""

    def __init__(
        self, rows: Tensor, shape: tuple[int, int, int], num_heads: int, impl: str
    ) -> None:
        self.num_samples, self.num_vision, words = shape
        self.num_heads, self.impl = num_heads, impl
        size = (self.num_samples, words, rows.shape[1])
        self.k, self.v = rows.new_empty(size), rows.new_empty(size)
        self.image: PackedKeys | None = None

    def write_image(self, samples: slice, k: Tensor, v: Tensor) -> None:
        """As ``LayerCache``."""
        own = (rows.unflatten(0, (-1, self.num_vision)) for rows in (k, v))
        packed, count = pack_keys(*own, num_heads=self.num_heads)
        if self.image is None:
            whole = packed.new_empty(self.num_samples, *packed.shape[1:])
            self.image = PackedKeys(whole, count)
        self.image.packed[samples] = packed

    def write_words(self, samples: list[int], place: int, k: Tensor, v: Tensor) -> None:
        """As ``LayerCache``."""
        _write(self.k, self.v, samples, place, k, v)

    def attend(self, q: Tensor, seen: Tensor, samples: tuple[int, ...]) -> Tensor:
        """As ``LayerCache``."""
        stop = seen.shape[2]
        return cached_attention(
            q,
            self.k[:, :stop],
            self.v[:, :stop],
            seen,
            num_heads=self.num_heads,
            samples=samples,
            impl=self.impl,
            prefix=self.image,
        )

    def keep(self, samples: Tensor) -> None:
        """As ``LayerCache``."""
        self.k, self.v = self.k[samples], self.v[samples]
        if self.image is not None:
            self.image = PackedKeys(self.image.packed[samples], self.image.num_keys)
        self.num_samples = len(samples)


def _write(
    keys: Tensor, values: Tensor, samples: list[int], first: int, k: Tensor, v: Tensor
) -> None:
    for cache, rows in ((keys, k), (values, v)):
        own = rows.unflatten(0, (len(samples), -1))
        cache[samples, first : first + own.shape[1]] = own
