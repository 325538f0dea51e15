"""QuestionBatch: images, questions about them, and how right each known answer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beit3_fast.data.pair_batch import PairBatch
from beit3_fast.errors import InputError


@dataclass(frozen=True)
class QuestionBatch(PairBatch):
    """A PairBatch of questions with ``scores`` float32 [B, answers] in [0, 1], 0 for most."""

    scores: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> QuestionBatch:
        """A copy on ``device``, images in ``dtype``."""
        moved = super().to(device, dtype)
        return QuestionBatch(**vars(moved), scores=self.scores.to(device, non_blocking=True))


def answer_scores(entry: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    """(label, score) of the answers in a line of an official VQA file. Raises InputError for a line that has none."""
    labels, scores = entry.get("labels"), entry.get("scores")
    if (
        not isinstance(labels, list)
        or not isinstance(scores, list)
        or len(labels) != len(scores)
        or not all(type(label) is int and label >= 0 for label in labels)
        or len(set(labels)) != len(labels)
        or not all(type(score) in (int, float) and 0 <= score <= 1 for score in scores)
    ):
        raise InputError(
            'expected "labels": [...] and "scores": [...], equally many, labels from 0 on, each once, and scores in [0, 1]'
        )
    return tuple(zip(labels, map(float, scores), strict=True))


def question_batch(
    batch: PairBatch, targets: Sequence[Sequence[tuple[int, float]]], answers: int
) -> QuestionBatch:
    """Pairs with the scores of ``answers`` known answers. Raises InputError for a label that is none of them."""
    scores = torch.zeros(len(targets), answers)
    for row, target in enumerate(targets):
        for label, score in target:
            check_answer(label, answers)
            scores[row, label] = score
    return QuestionBatch(**vars(batch), scores=scores)


def check_answer(label: int, answers: int) -> None:
    """Raises InputError for a label that is none of so many answers."""
    if label >= answers:
        raise InputError(
            f"a question has answer {label}, but the model only 0 to {answers - 1}; set [model] num_classes"
        )
