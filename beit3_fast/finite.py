"""Numbers that are not finite: no product returns them as a result, and no JSON has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from beit3_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def check_finite(scores: Tensor, what: str, places: Iterable[int]) -> None:
    """Raises InputError for the first row of scores [B, ...] with NaN or infinity, as the ``what`` of its place."""
    _check(
        scores,
        places,
        f"the scores of {what} {{}} are not finite: there is NaN or infinity in its input or in the weights, or the model "
        "overflows in this dtype; float16 ends at 65504, try bfloat16 or float32",
    )


def check_pixels(images: Tensor, places: Iterable[int]) -> None:
    """Raises InputError for the first of images [B, ...] with NaN or infinity: every word would be as likely as any other."""
    _check(
        images,
        places,
        "image {} holds NaN or infinity, of which no caption can be made; look at how it was normalised, and at overflow "
        "if it is of float16",
    )


def _check(rows: Tensor, places: Iterable[int], message: str) -> None:
    finite = rows.isfinite().flatten(1).all(1).tolist()
    for place, fine in zip(places, finite, strict=True):
        if not fine:
            raise InputError(message.format(place))


def for_json(value: Any) -> Any:
    """The same with null for numbers that are not finite, in nested tables and lists too."""
    if isinstance(value, Mapping):
        return {key: for_json(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
