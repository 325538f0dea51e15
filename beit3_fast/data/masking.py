"""Which patches and words of a sample are hidden, and what stands in their place.

The paper hides 40 % of the patches, in blocks, 15 % of the words of a text that stands alone and half of the words of a
caption. What it leaves open is an option of ``Masking``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from beit3_fast.data.tokenizer import UNK
from beit3_fast.errors import ConfigError, InputError

_PAIR_MASKS = ("both", "one")
# A block that falls on hidden patches only is drawn again; after so many in vain single patches are taken.
_ATTEMPTS = 10


@dataclass(frozen=True)
class Masking:
    """Shares and manner of masking.

    ``image``, ``pair_image``: share of the patches that is hidden, rounded to whole patches; ``text``, ``pair_text``:
    share of the words, rounded, at least one word. bos, eos and pad are never hidden.
    ``pair_masks``: "both" hides patches and words of a pair in the same pass, "one" draws for each sample which of the two.
    ``min_block``: least area of a block in patches; ``max_aspect``: longest side of a block over its shortest.
    ``random_words``, ``kept_words``: share of the hidden words that a random word replaces, and that stay what they are
    (0.1 and 0.1 in BERT); all others become ``<mask>``. Raises ConfigError for values that make no sense.
    """

    image: float = 0.4
    text: float = 0.15
    pair_image: float = 0.4
    pair_text: float = 0.5
    pair_masks: str = "both"
    min_block: int = 16
    max_aspect: float = 1 / 0.3
    random_words: float = 0.0
    kept_words: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            share = field.name not in ("pair_masks", "min_block", "max_aspect")
            if share and not (_is_number(value) and 0 <= value <= 1):
                raise ConfigError(f"{field.name} must be a share in [0, 1], got {value!r}")
        if self.random_words + self.kept_words > 1:
            raise ConfigError(
                "random_words and kept_words are shares of the hidden words, at most 1 together, got "
                f"{self.random_words} and {self.kept_words}"
            )
        if self.pair_masks not in _PAIR_MASKS:
            raise ConfigError(f"pair_masks must be one of {_PAIR_MASKS}, got {self.pair_masks!r}")
        if type(self.min_block) is not int or self.min_block < 1:
            raise ConfigError(f"min_block must be a positive integer, got {self.min_block!r}")
        if not (_is_number(self.max_aspect) and 1 <= self.max_aspect < math.inf):
            raise ConfigError(
                f"max_aspect must be a finite number of at least 1, got {self.max_aspect!r}"
            )

    def shares(self, kind: str, generator: np.random.Generator) -> tuple[float, float]:
        """Shares of the patches and of the words of one sample; ``kind`` is "image", "text" or "pair"."""
        if kind == "image":
            return self.image, 0.0
        if kind == "text":
            return 0.0, self.text
        if kind != "pair":
            raise ConfigError(f"kind must be 'image', 'text' or 'pair', got {kind!r}")
        if self.pair_masks == "both":
            return self.pair_image, self.pair_text
        return (self.pair_image, 0.0) if generator.random() < 0.5 else (0.0, self.pair_text)


class MaskedText(NamedTuple):
    """``tokens`` int64 [Nt] as the model sees them, and ``hidden`` bool [Nt], the places to predict."""

    tokens: Tensor
    hidden: Tensor


def check_seed(seed: Any) -> None:
    """Raises ConfigError for what random numbers cannot begin with."""
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"seed must be an integer of at least 0, got {seed!r}")


def sample_generator(seed: int, *place: int) -> np.random.Generator:
    """Random numbers of one sample: the same for the same ``seed`` and ``place`` (non-negative integers: which source,
    epoch, number), whatever was drawn elsewhere and in whichever process. Raises ConfigError for a seed below 0."""
    check_seed(seed)
    return np.random.default_rng([seed, *place])


@lru_cache(maxsize=8)
def sample_order(count: int, seed: int, *place: int) -> np.ndarray:
    """int64 [count]: the order of ``count`` samples, which ``seed`` and ``place`` (which source, epoch) decide."""
    return sample_generator(seed, *place).permutation(count)


def mask_patches(
    grid: tuple[int, int],
    share: float,
    generator: np.random.Generator,
    min_block: int = 16,
    max_aspect: float = 1 / 0.3,
) -> Tensor:
    """bool [rows * columns], True for the hidden patches: rectangles until their union is ``share`` of the grid.

    Exactly round(share * patches) are hidden; the last block is cut to that. Blocks have an area of ``min_block`` to
    all that is left to hide, and an aspect from 1 / max_aspect to max_aspect, drawn evenly in its logarithm.
    """
    rows, columns = grid
    hidden = np.zeros((rows, columns), dtype=bool)
    wanted = round(share * rows * columns)
    attempts = 0
    while (left := wanted - int(hidden.sum())) > 0 and attempts < _ATTEMPTS:
        area = generator.uniform(min(min_block, left), left)
        aspect = math.exp(generator.uniform(-math.log(max_aspect), math.log(max_aspect)))
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        top = int(generator.integers(rows - height + 1))
        side = int(generator.integers(columns - width + 1))
        block = hidden[top : top + height, side : side + width]
        new = np.flatnonzero(~block)[:left]
        attempts = 0 if len(new) else attempts + 1
        block[np.unravel_index(new, block.shape)] = True
    if left > 0:
        free = generator.permutation(np.flatnonzero(~hidden))[:left]
        hidden[np.unravel_index(free, hidden.shape)] = True
    return torch.from_numpy(hidden.reshape(-1))


def mask_words(
    tokens: Tensor,
    share: float,
    generator: np.random.Generator,
    mask_id: int,
    random_words: float = 0.0,
    kept_words: float = 0.0,
) -> MaskedText:
    """Hide ``share`` of the words of a text int64 [Nt], bos and eos included; the text itself is left as it is.

    bos, pad and eos are never hidden; random words are drawn from the pieces, 4 to mask_id - 1. Raises InputError for a text that
    is no int64 tensor [Nt].
    """
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise InputError(
            f"a text must be token ids, int64 [Nt], got {tokens.dtype} of shape {list(tokens.shape)}"
        )
    # In numpy, whose calls on a few numbers cost a fraction of PyTorch's.
    text = tokens.numpy()
    words = np.flatnonzero(text >= UNK)
    count = max(1, round(share * len(words))) if share and len(words) else 0
    places = np.sort(generator.permutation(words)[:count])
    luck = generator.random(count)
    drawn = generator.integers(UNK + 1, mask_id, count)
    seen, hidden = text.copy(), np.zeros(len(text), dtype=bool)
    hidden[places] = True
    instead = np.where(luck < random_words, drawn, mask_id)
    kept = (luck >= random_words) & (luck < random_words + kept_words)
    seen[places] = np.where(kept, text[places], instead)
    return MaskedText(torch.from_numpy(seen), torch.from_numpy(hidden))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
