"""How well hidden patches and words are predicted, and what one would get without looking."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from beit3_fast.data import MaskedBatch
from beit3_fast.data.masked_batch import TERMS
from beit3_fast.model import BEiT3ForPretraining
from beit3_fast.train.loop import Data


class Score(NamedTuple):
    """Of ``predictions`` the share ``accuracy`` is right; always naming the commonest token of these very samples would
    get ``unigram``."""

    accuracy: float
    unigram: float
    predictions: int


def evaluate(model: BEiT3ForPretraining, data: Data, batches: int) -> dict[str, Score]:
    """Scores of micro-batches 0 to ``batches`` - 1 by ``data.masked_batch.TERMS``; the model is left in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    right: Counter[str] = Counter()
    tokens: dict[str, Counter[int]] = {term: Counter() for term in TERMS}
    for number in range(batches):
        batch: MaskedBatch = data[number]
        for term, own in model.predict(batch.to(device)).items():
            right[term] += int(torch.eq(own.predicted, own.true).sum())
            tokens[term].update(own.true.tolist())
    scores = {}
    for term, own_tokens in tokens.items():
        count = own_tokens.total()
        if count:
            commonest = own_tokens.most_common(1)[0][1]
            scores[term] = Score(right[term] / count, commonest / count, count)
    return scores
