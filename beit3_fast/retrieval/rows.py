"""Rows of numbers that can be compared."""

from __future__ import annotations

import torch
from torch import Tensor

from beit3_fast.errors import InputError, ShapeError


def finite_rows(name: str, rows: Tensor) -> Tensor:
    """The rows [N, C] in fp32. Raises ShapeError for complex numbers, InputError where some are not finite in fp32."""
    if rows.is_complex():
        raise ShapeError(f"{name} must be real numbers, got {rows.dtype}")
    numbers = rows.detach().to(torch.float32)
    spoiled = len(numbers) - int(numbers.isfinite().all(1).sum())
    if spoiled:
        raise InputError(
            f"{name} must be finite, {spoiled} of its {len(numbers)} rows are not; look for NaN in the model's weights "
            "and inputs"
        )
    return numbers
