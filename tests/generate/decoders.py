"""Decoders without a model: scores that depend on the words so far, and a truth that tries every caption."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from beit3_fast.composite.head_top_k import likeliest
from beit3_fast.generate import Special
from beit3_fast.generate.decoder import words_of

SPECIAL = Special(bos=0, pad=1, eos=2, mask=9)
VOCABULARY = 12


class TableDecoder:
    """Log probabilities are drawn from a seed that is the input and its words; counts its calls.

    ``end`` is added to the end token's logit. ``rows`` holds how many inputs each step had.
    """

    keep_is_free = True

    def __init__(self, inputs: int, end: float = 0.0, vocabulary: int = VOCABULARY) -> None:
        self.live = list(range(inputs))
        self.end, self.vocabulary = end, vocabulary
        self.told: list[list[tuple[int, ...]]] = [[()] for _ in self.live]
        self.rows: list[int] = []

    def scores(self, which: int, words: tuple[int, ...]) -> Tensor:
        """[V] after ``words`` of input ``which``."""
        generator = torch.Generator().manual_seed(hash((which, *words)) % 2**31)
        out = torch.randn(self.vocabulary, generator=generator) * 2
        out[SPECIAL.eos] += self.end
        return out

    def start(self) -> Tensor:
        self.rows.append(len(self.live))
        return torch.stack([self.scores(which, ()) for which in self.live])

    def step(self, words: Tensor, parents: Tensor) -> Tensor:
        assert words.shape == parents.shape == (len(self.live), words.shape[1])
        self.rows.append(len(self.live))
        self.told = [
            [(*told[p], w) for w, p in zip(own, from_, strict=True)]
            for told, own, from_ in zip(self.told, words.tolist(), parents.tolist(), strict=True)
        ]
        rows = [
            torch.stack([self.scores(which, told) for told in beams])
            for which, beams in zip(self.live, self.told, strict=True)
        ]
        return torch.stack(rows)

    def logits(self, rows: Tensor) -> Tensor:
        """The rows of this decoder are logits."""
        return rows

    def likeliest(self, rows: Tensor, count: int, special: Special | None) -> tuple[Tensor, Tensor]:
        known = None if special is None else words_of(self.vocabulary, special, rows.device)
        return likeliest(rows, count, known)

    def keep(self, inputs: Tensor) -> None:
        self.live = [self.live[i] for i in inputs.tolist()]
        self.told = [self.told[i] for i in inputs.tolist()]


def every_caption(
    decoder: TableDecoder, which: int, max_length: int, penalty: float
) -> list[tuple[float, tuple[int, ...], bool]]:
    """(score, words, ended) of all captions of one input that there are, best first."""
    words = [w for w in range(SPECIAL.mask) if w not in (SPECIAL.bos, SPECIAL.pad, SPECIAL.eos)]
    found = []
    for count in range(max_length - 1):
        for told in product(words, repeat=count):
            log_p = sum(
                float(decoder.scores(which, told[:i]).log_softmax(0)[told[i]]) for i in range(count)
            )
            if count == max_length - 2:
                found.append((log_p / (count + 1) ** penalty, told, False))
                continue
            log_p += float(decoder.scores(which, told).log_softmax(0)[SPECIAL.eos])
            found.append((log_p / (count + 2) ** penalty, told, True))
    return sorted(found, reverse=True)
