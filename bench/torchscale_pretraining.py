"""Pretraining on torchscale's modules: what one packed pass of ours is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from beit3_fast.config import BEiT3Config
from beit3_fast.data import MaskedBatch
from beit3_fast.integrations import torchscale_models


class Pretraining(nn.Module):
    """Hidden patches and words through both heads, in three passes: images, padded pairs, padded texts.

    Takes the ``MaskedBatch`` of ``BEiT3ForPretraining`` and returns the same losses; words and patches are gathered before
    the heads, as the official captioning model does.
    """

    def __init__(self, config: BEiT3Config, num_classes: int = 8192) -> None:
        super().__init__()
        self.beit3 = torchscale_models.backbone(config)
        self.mlm_head = nn.Linear(config.embed_dim, config.vocab_size)
        self.mim_head = nn.Linear(config.embed_dim, num_classes)

    def forward(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """-> cross-entropies [M] of the terms image, pair_image, pair_text and text."""
        images, pairs, texts = batch.num_images, batch.num_pairs, batch.num_texts
        passes: list[tuple[slice | None, slice | None]] = []
        if images:
            passes.append((slice(0, images), None))
        if pairs:
            passes.append((slice(images, images + pairs), slice(0, pairs)))
        if texts:
            passes.append((None, slice(pairs, pairs + texts)))
        padded = _padded_texts(batch) if pairs or texts else ()
        width = self.mlm_head.in_features
        visual, words = ([self.mlm_head.weight.new_zeros(0, width)] for _ in range(2))
        for seen, read in passes:
            text, padding, hidden = (None,) * 3 if read is None else (t[read] for t in padded)
            patches = None
            if seen is not None and batch.hidden_patches is not None:
                patches = batch.hidden_patches[seen]
            rows = self.beit3(
                textual_tokens=text,
                visual_tokens=None if seen is None or batch.images is None else batch.images[seen],
                text_padding_position=padding,
                vision_masked_position=patches,
            )["encoder_out"]
            if patches is not None:
                visual.append(rows[:, 1 : 1 + patches.shape[1]][patches])
            if hidden is not None:
                words.append(rows[:, rows.shape[1] - hidden.shape[1] :][hidden])
        patch_logits = self.mim_head(torch.cat(visual)).float()
        word_logits = self.mlm_head(torch.cat(words)).float()
        of_patches = F.cross_entropy(patch_logits, batch.codes, reduction="none")
        of_words = F.cross_entropy(word_logits, batch.words, reduction="none")
        own, own_pairs = batch.counts["image"], batch.counts["pair_text"]
        return {
            "image": of_patches[:own],
            "pair_image": of_patches[own:],
            "pair_text": of_words[:own_pairs],
            "text": of_words[own_pairs:],
        }


def _padded_texts(batch: MaskedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, padding and hidden words of all texts, [P + T, Nt] each."""
    assert batch.tokens is not None
    assert batch.hidden_words is not None
    tokens = pad_sequence(
        batch.tokens.split(batch.text_lengths), batch_first=True, padding_value=1.0
    )
    hidden = pad_sequence(batch.hidden_words.split(batch.text_lengths), batch_first=True)
    lengths = torch.tensor(batch.text_lengths)[:, None]
    return tokens, torch.arange(tokens.shape[1])[None] >= lengths, hidden
