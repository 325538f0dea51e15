"""MaskedBatch: images, texts and pairs of one pretraining step, packed as the encoder takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_fast.errors import InputError

TERMS = ("image", "pair_image", "pair_text", "text")
"""What is predicted: patches of images, patches and words of pairs, words of texts."""


class MaskedSample(NamedTuple):
    """One sample: an image, a text or both.

    ``image`` [3, H, W]; ``hidden_patches`` bool [patches]; ``codes`` int64 [patches], the visual token of each patch, hidden or
    not; ``text`` int64 [Nt] with ``<mask>`` in place of hidden words; ``hidden_words`` bool [Nt]; ``words`` int64 [Nt],
    the text itself.
    """

    image: Tensor | None = None
    hidden_patches: Tensor | None = None
    codes: Tensor | None = None
    text: Tensor | None = None
    hidden_words: Tensor | None = None
    words: Tensor | None = None


@dataclass(frozen=True)
class MaskedBatch:
    """B samples in the order images (I of them), pairs (P), texts (T): what a pretraining model takes.

    ``images`` [I + P, 3, H, W], ``tokens`` int64 [Rt], the texts one behind the other without padding, of
    ``text_lengths``; either is None where no sample has it. ``hidden_patches`` bool [I + P, patches] and ``hidden_words``
    bool [Rt] name what is predicted; both always lie on the CPU, since they fix shapes. ``codes`` int64 [Mv] and ``words``
    int64 [Mt] are the true visual tokens and words there, in the order of the rows. ``counts`` has the number of
    predictions of each of ``TERMS``.
    """

    num_images: int
    num_pairs: int
    num_texts: int
    images: Tensor | None
    tokens: Tensor | None
    text_lengths: tuple[int, ...]
    hidden_patches: Tensor | None
    hidden_words: Tensor | None
    codes: Tensor
    words: Tensor
    counts: dict[str, int]

    @property
    def num_samples(self) -> int:
        """B."""
        return self.num_images + self.num_pairs + self.num_texts

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> MaskedBatch:
        """A copy with the model's inputs and targets on ``device``, images in ``dtype``; what fixes shapes stays."""

        def moved(tensor: Tensor | None, cast: torch.dtype | None = None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, cast, non_blocking=True)

        return replace(
            self,
            images=moved(self.images, dtype),
            tokens=moved(self.tokens),
            codes=self.codes.to(device, non_blocking=True),
            words=self.words.to(device, non_blocking=True),
        )


def masked_batch(samples: Sequence[MaskedSample]) -> MaskedBatch:
    """Pack samples, sorted by kind and else in their order.

    Raises InputError for no samples, a sample with neither image nor text, and images of several sizes.
    """
    kinds: tuple[list[MaskedSample], ...] = ([], [], [])
    for index, sample in enumerate(samples):
        if sample.image is None and sample.text is None:
            raise InputError(f"sample {index} has neither an image nor a text")
        kinds[0 if sample.text is None else 1 if sample.image is not None else 2].append(sample)
    images, pairs, texts = kinds
    if not samples:
        raise InputError("expected at least one sample, got none")
    seen, read = images + pairs, pairs + texts
    sizes = {tuple(s.image.shape) for s in seen if s.image is not None}
    if len(sizes) > 1:
        raise InputError(f"images of a batch must have one size, got {sorted(sizes)}")
    patches = [_given(s.hidden_patches, s.codes, "an image") for s in seen]
    words = [_given(s.hidden_words, s.words, "a text") for s in read]
    lengths = tuple(len(hidden) for hidden, _ in words)
    hidden = [int(own.sum()) for own, _ in patches], [int(own.sum()) for own, _ in words]
    counts = (
        sum(hidden[0][: len(images)]),
        sum(hidden[0][len(images) :]),
        sum(hidden[1][: len(pairs)]),
        sum(hidden[1][len(pairs) :]),
    )
    return MaskedBatch(
        num_images=len(images),
        num_pairs=len(pairs),
        num_texts=len(texts),
        images=torch.stack([s.image for s in seen if s.image is not None]) if seen else None,
        tokens=torch.cat([s.text for s in read if s.text is not None]) if read else None,
        text_lengths=lengths,
        hidden_patches=torch.stack([own for own, _ in patches]) if seen else None,
        hidden_words=torch.cat([own for own, _ in words]) if read else None,
        codes=_joined([true[own] for own, true in patches]),
        words=_joined([true[own] for own, true in words]),
        counts=dict(zip(TERMS, counts, strict=True)),
    )


def _given(hidden: Tensor | None, true: Tensor | None, what: str) -> tuple[Tensor, Tensor]:
    if hidden is None or true is None or hidden.shape != true.shape:
        shapes = [None if t is None else list(t.shape) for t in (hidden, true)]
        raise InputError(
            f"{what} needs a mask and targets of one shape, got {shapes[0]} and {shapes[1]}"
        )
    return hidden, true


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
