"""The keys and values of one layer while captions are decoded: an image's, and behind them those of the words.

Where the CPU kernels attend, those of the image lie in the order in which these read them, packed once for all steps;
else in front of the words' in one tensor, as PyTorch's attention reads them. No key of an image is copied from step to
step in either.
"""

from __future__ import annotations

from torch import Tensor

from beit3_fast.ops import (
    Measured,
    NewKeys,
    PackedKeys,
    measured_cached_attention,
    pack_keys,
    reads_packed_keys,
)
from beit3_fast.ops.whole_layer import LayerOperands, decoder_layer


class LayerCache:
    """The cache of ``samples`` images of ``vision`` tokens and ``words`` words each; keys and values like ``rows`` [R, C]."""

    def __init__(
        self, rows: Tensor, samples: int, vision: int, words: int, num_heads: int, impl: str
    ) -> None:
        self.num_samples, self.num_vision = samples, vision
        self.num_heads, self.impl = num_heads, impl
        # Places of k and v in front of the first word.
        self.front = 0 if reads_packed_keys(rows, impl) else vision
        size = (samples, self.front + words, rows.shape[1])
        # What no step has written yet may be read by one that hides it: a NaN would show.
        self.k, self.v = rows.new_zeros(size), rows.new_zeros(size)
        self.image: PackedKeys | None = None

    def write_image(self, samples: slice, k: Tensor, v: Tensor) -> None:
        """Take the keys and values [S * vision, C] of some images."""
        k, v = (rows.unflatten(0, (-1, self.num_vision)) for rows in (k, v))
        if self.front:
            self.k[samples, : self.front], self.v[samples, : self.front] = k, v
            return
        packed, count = pack_keys(k, v, num_heads=self.num_heads)
        if self.image is None:
            whole = packed.new_empty(self.num_samples, *packed.shape[1:])
            self.image = PackedKeys(whole, count)
        self.image.packed[samples] = packed

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        place: int | Tensor,
        seen: Tensor,
        samples: tuple[int, ...],
    ) -> Measured:
        """Rows [S * n, C] of q [S, n, C] to their image and to the words that ``seen`` bool [S, n, words so far] names.

        ``k`` and ``v`` [S * m, C] are those of ``m`` words a sample, which take the places from ``place`` on first;
        ``place`` counts words, as an int64 tensor [1] on the device those in front of them too.
        """
        stop = self.front + seen.shape[2]
        k, v = (rows.unflatten(0, (len(samples), -1)) for rows in (k, v))
        return measured_cached_attention(
            q,
            self.k[:, :stop],
            self.v[:, :stop],
            seen,
            num_heads=self.num_heads,
            samples=samples,
            impl=self.impl,
            prefix=self.image,
            front=self.front,
            new=NewKeys(k, v, place if isinstance(place, Tensor) else self.front + place),
        )

    def layer(
        self,
        x: Tensor,
        operands: LayerOperands,
        place: int | Tensor,
        seen: Tensor,
        samples: tuple[int, ...],
    ) -> Tensor | None:
        """A whole layer on the new rows x [S * m, C], see ``whole_layer.decoder_layer``; None where its ops are to be called."""
        if self.image is None or isinstance(place, Tensor):
            return None
        stop = seen.shape[2]
        return decoder_layer(
            x,
            operands,
            self.k[:, :stop],
            self.v[:, :stop],
            place=place,
            seen=seen,
            samples=samples,
            prefix=self.image,
            impl=self.impl,
        )

    def keep(self, samples: Tensor) -> None:
        """Hold on to the samples ``samples`` int64 only, in this order."""
        self.k, self.v = self.k[samples], self.v[samples]
        if self.image is not None:
            self.image = self.image._replace(packed=self.image.packed[samples])
        self.num_samples = len(samples)
