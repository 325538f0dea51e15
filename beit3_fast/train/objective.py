"""Masked data modelling as one loss: words and visual tokens of images, texts and pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor, nn

from beit3_fast.data import MaskedBatch
from beit3_fast.data.masked_batch import TERMS
from beit3_fast.errors import ConfigError


@dataclass(frozen=True)
class MaskedDataModelling:
    """The sum of four means: the cross-entropy of each of ``data.masked_batch.TERMS`` over its predictions, weighted.

    The paper states no weights. One for each term, the default, is what three passes with a mean loss each would give (images,
    texts, and pairs with two of them). A term without predictions in a step is left out of that step's sum. Raises
    ConfigError for weights that are negative or all zero.
    """

    image: float = 1.0
    pair_image: float = 1.0
    pair_text: float = 1.0
    text: float = 1.0

    def __post_init__(self) -> None:
        weights = [getattr(self, field.name) for field in fields(self)]
        sensible = all(isinstance(w, (int, float)) and 0 <= w < float("inf") for w in weights)
        if not sensible or not any(weights):
            raise ConfigError(
                f"weights must be numbers of at least 0, one of them above it, got {weights}"
            )

    def counts(self, batch: MaskedBatch) -> dict[str, int]:
        """Predictions of each term; those of all micro-batches of a step, added, are its ``totals``."""
        return batch.counts

    def __call__(
        self, model: nn.Module, batch: MaskedBatch, totals: Mapping[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the step's loss, and of each term's mean, detached.

        Shares of all micro-batches add up to the loss of the same samples in one batch: ``totals`` counts the predictions of
        the whole step.
        """
        losses: dict[str, Tensor] = model(batch)
        loss: Tensor | None = None
        terms: dict[str, Tensor] = {}
        for term in TERMS:
            if not totals[term]:
                continue
            mean = losses[term].sum() / totals[term]
            terms[term] = mean.detach()
            weighted = mean * getattr(self, term)
            loss = weighted if loss is None else loss + weighted
        if loss is None:
            raise ConfigError("nothing is hidden in this step; raise the shares of Masking")
        return loss, terms
