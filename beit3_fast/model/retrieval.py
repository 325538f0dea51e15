"""The released retrieval model, by its official names: image and text embeddings in one space."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.config import BEiT3Config
from beit3_fast.data.pair_batch import PairBatch
from beit3_fast.errors import ShapeError
from beit3_fast.model.contrastive_loss import contrastive_loss
from beit3_fast.model.task import BEiT3Task, take_further, text_of_all
from beit3_fast.model.work import Work, embedding_work, encoder_work, linear_work, training_work


class BEiT3ForRetrieval(BEiT3Task):
    """Image and text embeddings in one space, and the contrastive loss between them."""

    def __init__(self, config: BEiT3Config, impl: str = "auto") -> None:
        super().__init__(config, impl)
        width = config.embed_dim
        self.language_head = nn.Linear(width, width, bias=False)
        self.vision_head = nn.Linear(width, width, bias=False)
        self._init_head()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self,
        image: Tensor | None = None,
        text_description: Tensor | None = None,
        padding_mask: Tensor | None = None,
        only_infer: bool = False,
        **further: Any,
    ) -> tuple[Any, ...]:
        """(vision [B, C], language [B, C]), each None without its input; the loss comes first unless only_infer.

        image [B, 3, H, W]; text_description int64 [B, Nt]; padding_mask [B, Nt], nonzero for padding. The
        embeddings have unit length. Under torch.distributed the loss compares with every rank's batch.
        """
        take_further(self, further)
        vision = language = None
        if image is not None:
            encoded = self.beit3.encode(image=image, read_vision="first")
            vision = self._unit("image", encoded.vision())
        if text_description is not None:
            encoded = self.beit3.encode(
                text=text_description, text_padding=padding_mask, read_text="first"
            )
            language = self._unit("text", text_of_all(encoded))
        if only_infer:
            return vision, language
        if vision is None or language is None:
            raise ShapeError(
                "the contrastive loss needs an image and a text; pass only_infer=True for one of them"
            )
        return contrastive_loss(vision, language, self.logit_scale.exp()), vision, language

    def work(self, batch: PairBatch) -> Work:
        """What a training step on the batch needs at least; of the loss no more than the two heads."""
        config, count = self.config, batch.num_samples
        width, read = config.embed_dim, [1] * count
        forward = encoder_work(config, config.num_vision_tokens, [0] * count, read=read)
        forward += encoder_work(config, 0, batch.lengths, read=read)
        forward += linear_work(2 * count, width, width)
        return training_work(embedding_work(config, count), forward)

    def _pooling_head(self, kind: str) -> Callable[[Tensor], Tensor] | None:
        return None if kind == "pair" else partial(self._unit, kind)

    def _unit(self, kind: str, rows: Tensor) -> Tensor:
        head = self.vision_head if kind == "image" else self.language_head
        return F.normalize(head(rows), dim=-1)
