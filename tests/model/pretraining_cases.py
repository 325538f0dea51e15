"""Small batches of masked data modelling."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import TINY, randomize
from torch import Tensor

from beit3_fast.config import BEiT3Config
from beit3_fast.data import MaskedBatch, MaskedSample, masked_batch
from beit3_fast.data.masking import mask_patches, mask_words, sample_generator
from beit3_fast.model import BEiT3ForPretraining

CODES = 40
# 16 patches; a vocabulary of 100.
CONFIG = TINY.replace(patch_size=8)


def model(config: BEiT3Config = CONFIG, impl: str = "auto") -> Any:
    """With random weights, in evaluation mode."""
    return randomize(BEiT3ForPretraining(config, CODES, impl))


def sample(number: int, kind: str, config: BEiT3Config = CONFIG, words: int = 6) -> MaskedSample:
    """An image, a text or a pair, masked; texts have ``words`` to ``words`` + 2 words and bos and eos."""
    draw = torch.Generator().manual_seed(number)
    luck = sample_generator(0, number)
    fields: dict[str, Tensor] = {}
    if kind != "text":
        hidden = mask_patches(config.grid_size, 0.4, luck, min_block=2)
        codes = torch.randint(0, CODES, hidden.shape, generator=draw)
        image = torch.randn(3, *config.image_shape, generator=draw)
        fields |= {"image": image, "hidden_patches": hidden, "codes": codes}
    if kind != "image":
        own = torch.randint(4, config.vocab_size - 1, (words + number % 3,), generator=draw)
        text = torch.cat([torch.tensor([0]), own, torch.tensor([2])])
        seen, hidden = mask_words(text, 0.4, luck, config.vocab_size - 1)
        fields |= {"text": seen, "hidden_words": hidden, "words": text}
    return MaskedSample(**fields)


def batch(kinds: str, config: BEiT3Config = CONFIG, first: int = 0) -> MaskedBatch:
    """``kinds`` spells the samples: "i", "p" and "t"."""
    names = {"i": "image", "p": "pair", "t": "text"}
    return masked_batch(
        [sample(number, names[kind], config) for number, kind in enumerate(kinds, first)]
    )
