"""What classifiers say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from beit3_fast.errors import ConfigError


class Guess(NamedTuple):
    """One class: its number, its score in [0, 1], and its name where names were given."""

    class_id: int
    score: float
    label: str | None = None


def best(scores: Tensor, top_k: int, labels: Sequence[str] | None) -> list[list[Guess]]:
    """The ``top_k`` classes of every row of scores [B, classes], best first."""
    values, places = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
    return [
        [
            Guess(own_id, score, None if labels is None else labels[own_id])
            for own_id, score in zip(own, row, strict=True)
        ]
        for own, row in zip(places.tolist(), values.tolist(), strict=True)
    ]


def check_top_k(top_k: Any) -> None:
    """Raises ConfigError unless it is a positive integer."""
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ConfigError(f"top_k must be a positive integer, got {top_k!r}")
