"""Three of the released fine-tuning models: official class names, forward signatures and parameter names.

Each computes in the last layer only the rows that its head reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.config import BEiT3Config
from beit3_fast.data import Processor
from beit3_fast.data.labels import labels_for
from beit3_fast.data.pair_batch import PairBatch
from beit3_fast.errors import ConfigError, InputError, ShapeError
from beit3_fast.finite import check_finite
from beit3_fast.model.drop_path import without_drop_path
from beit3_fast.model.guess import Guess, best, check_top_k
from beit3_fast.model.inputs import (
    check_batch_size,
    image_batches,
    image_tensors,
    listed,
    text_tensors,
)
from beit3_fast.model.task import BEiT3Task, check_given, take_further, text_of_all
from beit3_fast.model.work import Work, embedding_work, encoder_work, linear_work, training_work


class BEiT3ForImageClassification(BEiT3Task):
    """Mean of the patch rows, LayerNorm, linear head: image [B, 3, H, W] -> logits [B, num_classes]."""

    def __init__(self, config: BEiT3Config, num_classes: int = 1000, impl: str = "auto") -> None:
        super().__init__(config, impl)
        self.fc_norm = nn.LayerNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, num_classes)
        self._init_head(self.head)

    def forward(self, image: Tensor, **further: Any) -> Tensor:
        """image [B, 3, H, W] -> logits [B, num_classes]."""
        check_given(image=image)
        take_further(self, further)
        encoded = self.beit3.encode(image=image)
        batch, width = encoded.layout.batch_size, encoded.rows.shape[1]
        tokens = encoded.rows.view(batch, encoded.layout.longest, width)
        return self.head(self.fc_norm(tokens[:, 1:].mean(1)))

    @torch.no_grad()
    @without_drop_path()
    def classify(
        self,
        images: Any,
        top_k: int = 5,
        *,
        labels: str | PathLike[str] | Sequence[str] | None = None,
        processor: Processor | None = None,
        batch_size: int = 32,
    ) -> list[list[Guess]]:
        """The ``top_k`` likeliest classes of every image, best first; scores are probabilities.

        ``images``: one or a list of any sizes, see ``BEiT3ForCaptioning.caption`` for the kinds. ``labels``: a file for
        ``beit3_fast.data.read_labels``, or a list with a name for each class. Raises ConfigError, InputError and
        ShapeError for what cannot be used, and InputError where scores are not finite.
        """
        check_top_k(top_k)
        names = labels_for(labels, self.head.out_features)
        sources = listed(images)
        out: list[list[Guess]] = [[]] * len(sources)
        for places, batch in image_batches(self.beit3, sources, processor, batch_size):
            logits = self(batch).float()
            check_finite(logits, "image", places)
            found = best(logits.softmax(dim=-1), top_k, names)
            for place, guesses in zip(places, found, strict=True):
                out[place] = guesses
        return out


class TwoLayerMLP(nn.Module):
    """LayerNorm, linear, LayerNorm, GELU, linear, by the official names."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_features)
        self.dense1 = nn.Linear(in_features, hidden_features)
        self.norm2 = nn.LayerNorm(hidden_features)
        self.dense2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] -> [B, out_features]."""
        return self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(x)))))


class BEiT3ForVisualReasoning(BEiT3Task):
    """Is the sentence true of the two images (NLVR2)? -> logits [B, num_classes]."""

    def __init__(self, config: BEiT3Config, num_classes: int = 2, impl: str = "auto") -> None:
        super().__init__(config, impl)
        width = config.embed_dim
        self.head = TwoLayerMLP(4 * width, 2 * width, num_classes)
        self._init_head(self.head.dense1, self.head.dense2)

    def forward(
        self,
        image_a: Tensor,
        image_b: Tensor,
        text_description: Tensor,
        padding_mask: Tensor,
        **further: Any,
    ) -> Tensor:
        """Images [B, 3, H, W] each, text int64 [B, Nt], padding_mask [B, Nt], nonzero for padding."""
        check_given(image_a=image_a, image_b=image_b, text_description=text_description)
        take_further(self, further)
        if image_a.shape != image_b.shape:
            raise ShapeError(
                "image_a and image_b must have the same shape, got "
                f"{list(image_a.shape)} and {list(image_b.shape)}"
            )
        encoded = self.beit3.encode(
            torch.cat([image_a, image_b]),
            torch.cat([text_description, text_description]),
            None if padding_mask is None else torch.cat([padding_mask, padding_mask]),
            read_vision="first",
            read_text="first",
        )
        states = torch.cat([encoded.vision(), text_of_all(encoded)], dim=1)  # [2B, 2C]
        return self.head(torch.cat(states.chunk(2), dim=1))

    @torch.no_grad()
    @without_drop_path()
    def reason(
        self,
        image_a: Any,
        image_b: Any,
        text: str | Sequence[str] | Sequence[Tensor] | Tensor,
        *,
        processor: Processor | None = None,
        batch_size: int = 16,
    ) -> list[float]:
        """The probability that each sentence is true of its two images (left ``image_a``, right ``image_b``).

        One of each or lists of one length; a single pair of images goes with every sentence. Kinds of images and texts
        as for ``encode_pair``; sizes may differ. Raises ConfigError for a model with other classes than false and
        true, InputError and ShapeError for what cannot be used, and InputError where scores are not finite.
        """
        if self.head.dense2.out_features != 2:
            raise ConfigError(
                f"reason needs the two classes false and true, this model has {self.head.dense2.out_features}"
            )
        pairs = [listed(image) for image in (image_a, image_b)]
        if len(pairs[0]) != len(pairs[1]):
            raise InputError(
                f"two images belong together, got {len(pairs[0])} as image_a and {len(pairs[1])} as image_b"
            )
        texts, (left, right) = _paired(self.beit3, text, pairs, processor)
        check_batch_size(batch_size)
        out: list[float] = []
        for start in range(0, len(texts), batch_size):
            own = slice(start, start + batch_size)
            images = left.tensors(own) + right.tensors(own)
            encoded = self.beit3.forward_packed(
                images, texts[own] * 2, read_vision="first", read_text="first"
            )
            states = torch.cat([encoded.vision(), encoded.text()], dim=1)  # [2B, 2C]
            logits = self.head(torch.cat(states.chunk(2), dim=1)).float()
            check_finite(logits, "sentence", range(start, start + len(logits)))
            out += logits.softmax(dim=-1)[:, 1].tolist()
        return out


class Pooler(nn.Module):
    """LayerNorm, linear, tanh of one row a sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] -> [B, C]."""
        return torch.tanh(self.dense(self.norm(x)))


class BEiT3ForVisualQuestionAnswering(BEiT3Task):
    """Which of the known answers fits the question about the image? -> logits [B, num_classes]."""

    def __init__(self, config: BEiT3Config, num_classes: int = 3129, impl: str = "auto") -> None:
        super().__init__(config, impl)
        width = config.embed_dim
        self.pooler = Pooler(width)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, num_classes),
        )
        self._init_head()

    def forward(
        self, image: Tensor, question: Tensor, padding_mask: Tensor, **further: Any
    ) -> Tensor:
        """image [B, 3, H, W], question int64 [B, Nt], padding_mask [B, Nt], nonzero for padding."""
        check_given(image=image, question=question)
        take_further(self, further)
        encoded = self.beit3.encode(
            image, question, padding_mask, read_vision="first", read_text="none"
        )
        return self.head(self.pooler(encoded.vision()))

    @torch.no_grad()
    @without_drop_path()
    def answer(
        self,
        images: Any,
        questions: str | Sequence[str] | Sequence[Tensor] | Tensor,
        top_k: int = 5,
        *,
        labels: str | PathLike[str] | Sequence[str] | None = None,
        processor: Processor | None = None,
        batch_size: int = 32,
    ) -> list[list[Guess]]:
        """The ``top_k`` answers to every question, best first.

        An image for each question, or one image for all of them: it is then read and prepared once, but encoded with
        every question anew, because in this encoder an image's rows see the question from the first layer on.
        ``labels``: the official answer2label.txt (``beit3_fast.data.read_labels``), or a list with an answer for each
        class. Scores are sigmoids, as the model was trained: they do not sum to one. Kinds of images and texts as for
        ``encode_pair``. Raises ConfigError, InputError and ShapeError for what cannot be used, and InputError where
        scores are not finite.
        """
        check_top_k(top_k)
        check_batch_size(batch_size)
        last: Any = self.head[-1]
        names = labels_for(labels, last.out_features)
        texts, (own_images,) = _paired(self.beit3, questions, [listed(images)], processor)
        out: list[list[Guess]] = []
        for start in range(0, len(texts), batch_size):
            own = slice(start, start + batch_size)
            encoded = self.beit3.forward_packed(
                own_images.tensors(own), texts[own], read_vision="first", read_text="none"
            )
            logits = self.head(self.pooler(encoded.vision())).float()
            check_finite(logits, "question", range(start, start + len(logits)))
            out += best(logits.sigmoid(), top_k, names)
        return out

    def work(self, batch: PairBatch) -> Work:
        """What a training step on the batch needs at least."""
        config = self.config
        last: Any = self.head[-1]
        width, read = config.embed_dim, [1] * batch.num_samples
        forward = encoder_work(config, config.num_vision_tokens, batch.lengths, read=read)
        forward += linear_work(batch.num_samples, width, width, 2 * width, last.out_features)
        return training_work(embedding_work(config, batch.num_samples), forward)

    def _pooling_head(self, kind: str) -> Callable[[Tensor], Tensor] | None:
        return self.pooler if kind == "pair" else None


class _Images:
    """A list of images, made into tensors as they are needed; a single one is made once and goes with every text."""

    def __init__(
        self, backbone: Any, images: list[Any], count: int, processor: Processor | None
    ) -> None:
        self._backbone, self._images, self._processor = backbone, images, processor
        self._only = None
        if len(images) == 1:
            self._only = image_tensors(backbone, images, processor)
        self._count = count

    def tensors(self, own: slice) -> list[Tensor]:
        """[3, H, W] for the texts ``own``."""
        if self._only is not None:
            return self._only * len(range(self._count)[own])
        return image_tensors(self._backbone, self._images[own], self._processor, own.start)


def _paired(
    backbone: Any, texts: Any, images: list[list[Any]], processor: Processor | None
) -> tuple[list[Tensor], list[_Images]]:
    """Token ids of the texts, and images that go with them. Raises InputError where the counts do not fit."""
    tokens = text_tensors(texts, processor, next(backbone.parameters()).device)
    for own in images:
        if len(own) not in (1, len(tokens)):
            raise InputError(
                f"every text goes with an image, or all with one, got {len(own)} images and {len(tokens)} texts"
            )
    return tokens, [_Images(backbone, own, len(tokens), processor) for own in images]
