"""Batch: the inputs of a model by name, moved and cast together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit3_fast.errors import ConfigError


class Batch(dict[str, Any]):
    """A dictionary of tensors, or of lists of tensors where rows differ in length.

    Keys that this package fills, B samples, N tokens:

    - ``image`` float32 [B, 3, H, W], normalised by an ImagePreset;
    - ``text_tokens`` int64 [B, N];
    - ``text_padding_mask`` bool [B, N], True at padding: torchscale's and the official models' meaning;
    - ``attention_mask`` int64 [B, N], 1 at tokens to keep, 0 at padding: Hugging Face's meaning.
    """

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        non_blocking: bool = False,
    ) -> Batch:
        """A new batch on ``device``; floating-point tensors become ``dtype``, ids and masks keep theirs.

        ``dtype`` may also come alone, as in ``batch.to(torch.bfloat16)``. Raises ConfigError when it is not a
        floating-point dtype: ids cast to it would be lost.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise ConfigError(f"expected (device, dtype), got two dtypes: {device} and {dtype}")
            device, dtype = None, device
        floating = None if dtype is None else _floating(dtype)

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                cast = floating if value.is_floating_point() else None
                return value.to(device=device, dtype=cast, non_blocking=non_blocking)
            if isinstance(value, (list, tuple)):
                return type(value)(move(item) for item in value)
            return value

        return Batch({key: move(value) for key, value in self.items()})


def _floating(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    raise ConfigError(
        f"dtype must be floating-point, such as torch.bfloat16 or 'bfloat16', got {dtype!r}; ids and masks "
        "keep their own"
    )
