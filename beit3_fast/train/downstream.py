"""The tasks of fine-tuning: what each reads beside image and text, minimises and is judged by. A further task is an entry."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from beit3_fast.data.pair_batch import PairBatch
from beit3_fast.data.paired import PairedData, token_ids
from beit3_fast.data.question_batch import answer_scores, check_answer, question_batch
from beit3_fast.data.tokenizer import segments
from beit3_fast.errors import InputError
from beit3_fast.retrieval import recall
from beit3_fast.train.contrastive import ContrastiveTuning
from beit3_fast.train.examples import Example, found_images, given_answers
from beit3_fast.train.question_answering import QuestionAnswering, answer_accuracy

Collate = Callable[[PairBatch, Sequence[Any]], Any]


@dataclass(frozen=True)
class Downstream:
    """One task, under the last part of its models' names, which decides the class (``model.registry.TASKS``).

    ``target``: what a line of the official index file has beside image and text, from its dictionary, or InputError;
    ``collate``: for a model, what makes a batch of pairs and their targets; ``objective``: the dataclass of ``[loss]``;
    ``score``: figures of a model on held-out data, the first of them the one that counts; ``examples``: a few of its
    predictions there; ``check``: raises InputError for targets that a model cannot have.
    """

    target: Callable[[dict[str, Any]], Any]
    collate: Callable[[Any], Collate]
    objective: type[Any]
    score: Callable[[Any, PairedData[Any]], dict[str, float]]
    examples: Callable[[Any, PairedData[Any], Sequence[str] | None], list[Example]]
    check: Callable[[Any, Sequence[Any]], None] = lambda model, targets: None


def _image_id(entry: dict[str, Any]) -> int:
    number = entry.get("image_id")
    if type(number) is not int:
        raise InputError('expected "image_id", an integer')
    return number


def _pairs_alone(model: Any) -> Collate:
    return _without_targets


def _without_targets(batch: PairBatch, targets: Sequence[Any]) -> PairBatch:
    return batch


def _with_scores(model: Any) -> Collate:
    return partial(question_batch, answers=model.head[-1].out_features)


def _known_answers(model: Any, targets: Sequence[Sequence[tuple[int, float]]]) -> None:
    most = max((label for target in targets for label, _ in target), default=-1)
    check_answer(most, model.head[-1].out_features)


@torch.no_grad()
def retrieval_recall(model: Any, data: PairedData[PairBatch]) -> dict[str, float]:
    """Recall among the images of all rows, each encoded once. Rows of one file are its captions, whatever their image_id: ids
    begin anew in each index file."""
    model.eval()
    files = [os.path.realpath(row.image) for row in data.rows]
    first: dict[str, str] = {}
    for file, row in zip(files, data.rows, strict=True):
        first.setdefault(file, row.image)
    processor, places = data.processor, {file: place for place, file in enumerate(first)}
    images = model.encode_image(
        list(first.values()), processor=processor, batch_size=data.batch_size
    )
    ids = [token_ids(row.text, processor.tokenizer) for row in data.rows]
    texts = segments(ids, processor.max_length, padding=False)["text_tokens"]
    found = recall(images, model.encode_text(texts), [places[file] for file in files])
    return {
        "IR@1": found.image_retrieval[1],
        "TR@1": found.text_retrieval[1],
        "IR@5": found.image_retrieval[5],
        "TR@5": found.text_retrieval[5],
        "mean": found.mean,
    }


DOWNSTREAM = {
    "vqav2": Downstream(
        answer_scores,
        _with_scores,
        QuestionAnswering,
        answer_accuracy,
        given_answers,
        _known_answers,
    ),
    "retrieval": Downstream(
        _image_id, _pairs_alone, ContrastiveTuning, retrieval_recall, found_images
    ),
}
