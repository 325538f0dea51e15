"""Classes given by words: the text embeddings of the labels are the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast.data import Processor
from beit3_fast.data.index_files import check_words
from beit3_fast.errors import ConfigError, InputError
from beit3_fast.finite import check_finite
from beit3_fast.model import BEiT3ForRetrieval
from beit3_fast.model.guess import Guess, best, check_top_k
from beit3_fast.retrieval.model import check_retrieval

TEMPLATES = ("a photo of a {}.",)


class ZeroShotClassifier:
    """Made by ``zero_shot_classifier``: ``labels``, and ``weights`` fp32 [L, C] of unit length, one row a label."""

    def __init__(
        self,
        model: BEiT3ForRetrieval,
        labels: tuple[str, ...],
        weights: Tensor,
        processor: Processor | None,
    ) -> None:
        self.model, self.labels, self.weights, self.processor = model, labels, weights, processor

    @torch.no_grad()
    def logits(self, images: Any, batch_size: int = 32) -> Tensor:
        """fp32 [B, L] for one image or a list, as ``model.encode_image`` takes them; their softmax is the probabilities."""
        embedded = self.model.encode_image(images, processor=self.processor, batch_size=batch_size)
        # in bfloat16 logits of 32 and more are multiples of a quarter, and classes tie
        return self.model.logit_scale.float().exp() * embedded.float() @ self.weights.T

    def __call__(self, images: Any, top_k: int = 5, *, batch_size: int = 32) -> list[list[Guess]]:
        """The ``top_k`` likeliest labels of every image, best first.

        Raises what ``model.encode_image`` raises, and InputError where scores are not finite.
        """
        check_top_k(top_k)
        logits = self.logits(images, batch_size)
        check_finite(logits, "image", range(len(logits)))
        return best(logits.softmax(dim=-1), top_k, self.labels)


@torch.no_grad()
def zero_shot_classifier(
    model: Any,
    labels: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    processor: Processor | None = None,
    batch_size: int = 256,
) -> ZeroShotClassifier:
    """Make a classifier of a retrieval model from the names of the classes.

    ``templates`` are sentences with one ``{}`` for the label; a label's weight is the mean of its sentences' unit
    embeddings, scaled to unit length. ``processor`` needs a tokenizer and is kept for the images. Raises ConfigError
    for another model, no tokenizer or a template without its place, InputError for labels that are no list of str, or
    whose weights are not finite.
    """
    model = check_retrieval(model)
    names = _strings("labels", labels)
    for index, name in enumerate(names):
        check_words(name, f"label {index}")
    sentences = _strings("templates", templates)
    for template in sentences:
        if template.count("{}") != 1:
            raise ConfigError(
                f"a template must have one {{}} for the label, such as {TEMPLATES[0]!r}, got {template!r}"
            )
    # replace, not format: a label or template may have braces of its own.
    texts = [template.replace("{}", name) for name in names for template in sentences]
    embedded = model.encode_text(texts, processor=processor, batch_size=batch_size)
    means = embedded.float().unflatten(0, (len(names), len(sentences))).mean(1)
    check_finite(means, "label", range(len(names)))
    return ZeroShotClassifier(model, names, F.normalize(means, dim=-1), processor)


def _strings(what: str, values: Any) -> tuple[str, ...]:
    if (
        not isinstance(values, (list, tuple))
        or not values
        or not all(isinstance(value, str) for value in values)
    ):
        raise InputError(f"{what} must be a list of at least one str, got {values!r:.80}")
    return tuple(values)
