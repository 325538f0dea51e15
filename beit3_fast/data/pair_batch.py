"""PairBatch: images and the texts that belong to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairBatch:
    """B pairs: ``image`` [B, 3, H, W], ``tokens`` int64 [B, N], ``padding`` bool [B, N], True behind a text's end."""

    image: Tensor
    tokens: Tensor
    padding: Tensor

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.image)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return (~self.padding).sum(1).tolist()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PairBatch:
        """A copy on ``device``, images in ``dtype``."""
        return PairBatch(
            self.image.to(device, dtype, non_blocking=True),
            self.tokens.to(device, non_blocking=True),
            self.padding.to(device, non_blocking=True),
        )
