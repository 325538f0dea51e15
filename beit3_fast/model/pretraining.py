"""The model of masked data modelling: one backbone, a head for words and a head for visual tokens.

Official pretraining files carry both heads as ``mlm_head`` and ``mim_head``; the class itself was never released.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from beit3_fast.config import BEiT3Config
from beit3_fast.data import MaskedBatch
from beit3_fast.data.masked_batch import TERMS
from beit3_fast.errors import ConfigError
from beit3_fast.model.task import BEiT3Task
from beit3_fast.model.work import Work, embedding_work, encoder_work, linear_work, training_work
from beit3_fast.ops import masked_linear_cross_entropy

NUM_CODES = 8192
"""Visual tokens of the BEiT v2 tokenizer."""

# Logits that exist at a time where words are predicted: 64 MiB in fp32.
_LOGITS = 1 << 24


class Predictions(NamedTuple):
    """Hidden patches and words of one of ``data.masked_batch.TERMS``: what the model takes them for, and what they
    are; int64 [M] each."""

    predicted: Tensor
    true: Tensor


class BEiT3ForPretraining(BEiT3Task):
    """Predicts hidden patches and words of images, texts and pairs, all in one forward."""

    def __init__(
        self, config: BEiT3Config, num_classes: int = NUM_CODES, impl: str = "auto"
    ) -> None:
        super().__init__(config, impl)
        if "text" in config.modalities:
            self.mlm_head = nn.Linear(config.embed_dim, config.vocab_size)
        if "vision" in config.modalities:
            self.mim_head = nn.Linear(config.embed_dim, num_classes)
        self._init_head()

    def forward(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """Cross-entropies of the hidden patches and words, fp32 [M], by ``data.masked_batch.TERMS``.

        ``num_classes`` of the constructor is the number of visual tokens. Only hidden rows are computed in the last layer
        and reach a head; logits are never held as a whole. Raises ShapeError for a batch that does not fit the model.
        """
        vision, text = self._hidden_rows(batch)
        return _by_term(
            batch,
            self._losses(vision, "mim_head", batch.codes),
            self._losses(text, "mlm_head", batch.words),
        )

    @torch.no_grad()
    def predict(self, batch: MaskedBatch) -> dict[str, Predictions]:
        """The likeliest visual token or word at every hidden place, by ``data.masked_batch.TERMS``."""
        vision, text = self._hidden_rows(batch)
        likeliest = _by_term(
            batch, self._likeliest(vision, "mim_head"), self._likeliest(text, "mlm_head")
        )
        true = _by_term(batch, batch.codes, batch.words)
        return {term: Predictions(likeliest[term], true[term]) for term in TERMS}

    def work(self, batch: MaskedBatch) -> Work:
        """What a training step on the batch needs at least."""
        seen = batch.num_images + batch.num_pairs
        codes = self._head("mim_head").out_features if seen else 0
        return masked_work(self.config, batch, codes)

    def _hidden_rows(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """Output rows [Mv, C] of the hidden patches and [Mt, C] of the hidden words."""
        hidden, read_vision = batch.hidden_patches, None
        if hidden is not None and batch.images is not None:
            # The class token in front of the patches is never hidden.
            read_vision = torch.cat([hidden.new_zeros(len(hidden), 1), hidden], dim=1).flatten()
            hidden = hidden.to(batch.images.device, non_blocking=True)
        encoded = self.beit3.encode_ordered(
            batch.images,
            batch.tokens,
            batch.text_lengths,
            batch.num_images,
            vision_masked_position=hidden,
            read_vision="none" if read_vision is None else read_vision,
            read_text="none" if batch.hidden_words is None else batch.hidden_words,
        )
        split = encoded.layout.num_vision_rows
        return encoded.rows[:split], encoded.rows[split:]

    def _losses(self, rows: Tensor, head: str, targets: Tensor) -> Tensor:
        if not len(rows):
            return rows.new_zeros(0, dtype=torch.float32)
        linear = self._head(head)
        return masked_linear_cross_entropy(
            rows,
            linear.weight,
            linear.bias,
            torch.arange(len(rows), device=rows.device),
            targets,
            reduction="none",
            impl=self.beit3.impl,
        )

    def _likeliest(self, rows: Tensor, head: str) -> Tensor:
        if not len(rows):
            return torch.zeros(0, dtype=torch.int64, device=rows.device)
        linear = self._head(head)
        step = max(1, _LOGITS // linear.out_features)
        return torch.cat([linear(part).argmax(dim=1) for part in rows.split(step)])

    def _head(self, name: str) -> nn.Linear:
        head = self._modules.get(name)
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                f"this model has no {name}; create it with modalities=('vision', 'text')"
            )
        return head


def masked_work(config: BEiT3Config, batch: MaskedBatch, num_codes: int) -> Work:
    """Of a training step on a batch: in the last layer only hidden rows, which alone reach a head."""
    tokens, pairs = config.num_vision_tokens, batch.num_pairs
    patches = _counts(batch.hidden_patches, [tokens - 1] * (batch.num_images + pairs))
    words = _counts(batch.hidden_words, batch.text_lengths)
    both = [a + b for a, b in zip(patches[batch.num_images :], words[:pairs], strict=True)]
    forward = (
        encoder_work(config, tokens, [0] * batch.num_images, read=patches[: batch.num_images])
        + encoder_work(config, tokens, batch.text_lengths[:pairs], read=both)
        + encoder_work(config, 0, batch.text_lengths[pairs:], read=words[pairs:])
        + linear_work(sum(patches), config.embed_dim, num_codes)
        + linear_work(sum(words), config.embed_dim, config.vocab_size)
    )
    return training_work(embedding_work(config, batch.num_images + pairs), forward)


def _counts(hidden: Tensor | None, lengths: Sequence[int]) -> list[int]:
    """How many places of each sample are hidden; ``lengths`` are those of the samples."""
    if hidden is None:
        return []
    return [int(part.sum()) for part in hidden.flatten().split(list(lengths))]


def _by_term(batch: MaskedBatch, vision: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Values of the hidden patches and words, which lie in the order of the terms, under the terms' names."""
    counts = batch.counts
    own, pairs = vision.split([counts["image"], counts["pair_image"]])
    captions, alone = text.split([counts["pair_text"], counts["text"]])
    return {"image": own, "pair_image": pairs, "pair_text": captions, "text": alone}
