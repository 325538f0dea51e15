"""What decoding needs of a model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Decoder(Protocol):
    """Scores of the next token for S inputs with W captions each; whatever they share is computed once."""

    def start(self) -> Tensor:
        """Logits [S, V] of the first token of every input."""
        ...

    def step(self, words: Tensor, parents: Tensor) -> Tensor:
        """Logits [S, W, V] after ``words`` int64 [S, W], each added to the caption ``parents`` int64 [S, W]."""
        ...

    def keep(self, inputs: Tensor) -> None:
        """Go on with some of the S inputs only, int64 [S'], ascending."""
        ...
