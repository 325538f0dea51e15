"""Captions from a Decoder, all at once or word by word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from beit3_fast.finite import check_finite
from beit3_fast.generate.beam import beam_search
from beit3_fast.generate.decoder import Decoder
from beit3_fast.generate.options import Options, Special
from beit3_fast.generate.sample import choose_words, sample


@dataclass(frozen=True)
class Caption:
    """One caption: its words as ids, sum(log p) / tokens ** length_penalty, and whether the end token was reached.

    ``text`` is set where a processor with a tokenizer was at hand.
    """

    tokens: tuple[int, ...]
    score: float
    ended: bool
    text: str | None = None


class CaptionStep(NamedTuple):
    """One word of a caption in the making; ``text`` is what it adds to the text (None without a tokenizer)."""

    token: int
    log_p: float
    text: str | None = None


def captions(
    decoder: Decoder, options: Options, special: Special, generator: torch.Generator | None = None
) -> list[list[Caption]]:
    """For every input of ``decoder`` its ``options.num_return_sequences`` captions, best first."""
    if options.searches:
        found = beam_search(decoder, options, special)
    else:
        found = sample(decoder, options, special, generator)
    columns = (found.tokens, found.lengths, found.scores, found.ended)
    return [
        [
            Caption(tuple(tokens[:length]), score, ended)
            for tokens, length, score, ended in zip(*rows, strict=True)
        ]
        for rows in zip(*(column.tolist() for column in columns), strict=True)
    ]


def caption_steps(
    decoder: Decoder, options: Options, special: Special, generator: torch.Generator | None = None
) -> Iterator[CaptionStep]:
    """The words of one input's one caption, each as soon as it is chosen; the end token is not among them.

    Raises InputError at a word whose probability is not finite.
    """
    for words, log_p, _ in choose_words(decoder, options, special, generator):
        check_finite(log_p, "image", [0])
        if int(words) == special.eos:
            return
        yield CaptionStep(int(words), float(log_p))
