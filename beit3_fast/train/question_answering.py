"""Fine-tuning to answer questions: which of the known answers are right, and how right, as the official engine has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.data.paired import PairedData
from beit3_fast.data.question_batch import QuestionBatch


@dataclass(frozen=True)
class QuestionAnswering:
    """Binary cross-entropy of every answer's logit and soft score, summed over answers, mean over questions.

    This is the official loss: the mean over all logits times the number of answers. It has no label smoothing.
    """

    def counts(self, batch: QuestionBatch) -> dict[str, int]:
        """Questions of a micro-batch."""
        return {"questions": batch.num_samples}

    def __call__(
        self, model: nn.Module, batch: QuestionBatch, totals: Mapping[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the step's mean, and the same detached, as "answers"."""
        logits = model(image=batch.image, question=batch.tokens, padding_mask=batch.padding)
        total = F.binary_cross_entropy_with_logits(logits.float(), batch.scores, reduction="sum")
        share = total / totals["questions"]
        return share, {"answers": share.detach()}


@torch.no_grad()
def answer_accuracy(model: Any, data: PairedData[QuestionBatch]) -> dict[str, float]:
    """The mean score of the likeliest answer over all rows, VQA's accuracy; the model is left in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    right = 0.0
    for batch in data.in_order():
        own = batch.to(device)
        logits = model(image=own.image, question=own.tokens, padding_mask=own.padding)
        right += float(own.scores.gather(1, logits.argmax(1, keepdim=True)).sum())
    return {"accuracy": right / len(data.rows)}
