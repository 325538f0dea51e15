"""What decoding needs of a model."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from beit3_fast.generate.options import Special


class Decoder(Protocol):
    """Scores of the next token for S inputs with W captions each; whatever they share is computed once.

    A step gives rows, one for each next token, good until the next step; of them all logits can be had, or only the best.
    ``keep_is_free`` says that neither ``keep`` nor asking which captions are finished costs anything.
    """

    keep_is_free: bool

    def start(self) -> Tensor:
        """Rows [S, C] that stand for the first token of every input."""
        ...

    def step(self, words: Tensor, parents: Tensor) -> Tensor:
        """Rows [S, W, C] after ``words`` int64 [S, W], each added to the caption ``parents`` int64 [S, W]."""
        ...

    def logits(self, rows: Tensor) -> Tensor:
        """Logits [..., V] of rows [..., C]."""
        ...

    def likeliest(self, rows: Tensor, count: int, special: Special | None) -> tuple[Tensor, Tensor]:
        """The ``count`` likeliest tokens of rows [..., C], best first: log p (fp32 at least) and ids [..., count].

        ``special``: tokens that are no words are not chosen, though they count in the probabilities.
        """
        ...

    def keep(self, inputs: Tensor) -> None:
        """Go on with some of the S inputs only, int64 [S'], ascending."""
        ...


def dtype_of_scores(rows: Tensor) -> torch.dtype:
    """In what log p and their sums are kept for rows of this dtype: fp32, fp64 for fp64."""
    return torch.promote_types(rows.dtype, torch.float32)


def words_of(vocabulary: int, special: Special, device: torch.device) -> Tensor:
    """bool [V], True at tokens that are words, or end a caption."""
    words = torch.arange(vocabulary, device=device) < special.mask
    words[[special.bos, special.pad]] = False
    return words


# Where the answer must come from a device, it is not asked for after every step.
_STEPS_BETWEEN_QUESTIONS = 4


def survivors(decoder: Decoder, done: Tensor, steps: int) -> Tensor | None:
    """The inputs to go on with after ``steps`` steps, int64 [S'], where it is worth it that others leave; else None.

    ``done`` bool [S]. Where leaving is not free, what stays is moved together: half of the inputs must be done.
    """
    if not decoder.keep_is_free and steps % _STEPS_BETWEEN_QUESTIONS:
        return None
    if not bool(done.any()):
        return None
    live = (~done).nonzero().flatten()
    return live if decoder.keep_is_free or 2 * len(live) <= len(done) else None
