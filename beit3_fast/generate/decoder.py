"""What decoding needs of a model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Decoder(Protocol):
    """Scores of the next token for S inputs with W captions each; whatever they share is computed once.

    ``keep_is_free`` says that neither ``keep`` nor asking which captions are finished costs anything.
    """

    keep_is_free: bool

    def start(self) -> Tensor:
        """Logits [S, V] of the first token of every input."""
        ...

    def step(self, words: Tensor, parents: Tensor) -> Tensor:
        """Logits [S, W, V] after ``words`` int64 [S, W], each added to the caption ``parents`` int64 [S, W]."""
        ...

    def keep(self, inputs: Tensor) -> None:
        """Go on with some of the S inputs only, int64 [S'], ascending."""
        ...


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
