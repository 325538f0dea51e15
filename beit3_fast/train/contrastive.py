"""Contrastive tuning of a dual encoder: images and texts apart, matching ones drawn together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from beit3_fast.data.pair_batch import PairBatch
from beit3_fast.model.contrastive_loss import contrastive_loss

__all__ = ["ContrastiveTuning", "contrastive_loss"]


@dataclass(frozen=True)
class ContrastiveTuning:
    """The loss of ``BEiT3ForRetrieval``, or of any model that is called like it and returns its loss first.

    A pair is told apart from all pairs of its micro-batch on all processes, not from those of other micro-batches: for more
    of them raise the micro-batch or the number of processes, not ``accumulation``. The paper's intermediate tuning has 16k pairs
    a step, lr 3e-5, 5 epochs, drop path 0.3, layer decay 0.95. A run is not continued on another number of processes.
    """

    across_processes = True

    def counts(self, batch: PairBatch) -> dict[str, int]:
        """Pairs of a micro-batch."""
        return {"pairs": batch.num_samples}

    def __call__(
        self, model: nn.Module, batch: PairBatch, totals: Mapping[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the step's mean over all pairs, and the same detached, as "contrastive"."""
        loss = model(image=batch.image, text_description=batch.tokens, padding_mask=batch.padding)[
            0
        ]
        share = loss * (batch.num_samples / totals["pairs"])
        return share, {"contrastive": share.detach()}
