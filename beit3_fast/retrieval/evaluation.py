"""Recall as the field counts it: is one of the right ones among the first k?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beit3_fast.data import Processor
from beit3_fast.data.index_files import check_words
from beit3_fast.errors import ConfigError, InputError, ShapeError
from beit3_fast.retrieval.model import check_retrieval
from beit3_fast.retrieval.rows import finite_rows

KS = (1, 5, 10)
# Scores of a block of rows against everything are held at once.
_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Recall:
    """Shares in [0, 1] by k: texts found for an image (TR@k), images found for a text (IR@k), and the mean of all."""

    text_retrieval: dict[int, float]
    image_retrieval: dict[int, float]

    @property
    def mean(self) -> float:
        """The average of all shares, the official ``average_score``."""
        shares = [*self.text_retrieval.values(), *self.image_retrieval.values()]
        return sum(shares) / len(shares)


def recall(
    images: Tensor, texts: Tensor, image_of_text: Tensor | Sequence[int], ks: Sequence[int] = KS
) -> Recall:
    """Recall of embeddings: images [I, C], texts [T, C], and for each text the row of its image, int64 [T].

    What is near has a large inner product, the cosine of unit rows. TR@k: an image counts where any of its texts is among
    its k nearest texts. IR@k: a text counts where its image is
    among its k nearest images. Images without a text count as not found. Raises ShapeError and InputError for
    operands that do not fit, ConfigError for ks that are no positive integers.
    """
    for name, rows in (("images", images), ("texts", texts)):
        if not isinstance(rows, Tensor) or rows.dim() != 2 or not len(rows):
            raise ShapeError(
                f"{name} must be embeddings [N, C], at least one, got "
                f"{list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__}"
            )
    images, texts = finite_rows("images", images), finite_rows("texts", texts)
    if images.shape[1] != texts.shape[1]:
        raise ShapeError(
            f"images and texts must have one width, got {images.shape[1]} and {texts.shape[1]}"
        )
    if (
        not isinstance(ks, (list, tuple))
        or not ks
        or not all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in ks)
    ):
        raise ConfigError(f"ks must be positive integers, got {ks!r}")
    try:
        owner = torch.as_tensor(image_of_text, device=images.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ShapeError(
            f"image_of_text must be int64 [T] = [{len(texts)}], got {image_of_text!r:.80}"
        ) from error
    if owner.dtype != torch.int64 or tuple(owner.shape) != (len(texts),):
        raise ShapeError(
            f"image_of_text must be int64 [T] = [{len(texts)}], got {owner.dtype} of shape {list(owner.shape)}"
        )
    if int(owner.min()) < 0 or int(owner.max()) >= len(images):
        raise InputError(
            f"image_of_text must name rows of images, 0 to {len(images) - 1}, got {int(owner.min())} to "
            f"{int(owner.max())}"
        )
    numbers = torch.arange(len(images), device=images.device)
    with torch.autocast(images.device.type, enabled=False):
        return Recall(
            _found(images, texts, numbers, owner, ks), _found(texts, images, owner, numbers, ks)
        )


def evaluate_retrieval(
    model: Any,
    images: Sequence[Any],
    captions: Sequence[Sequence[str]],
    *,
    processor: Processor | None = None,
    batch_size: int = 32,
    ks: Sequence[int] = KS,
) -> Recall:
    """Recall of a retrieval model on images with their captions; every image is encoded once.

    ``captions[i]`` are those of ``images[i]``, any number of them. Raises ConfigError for another model and InputError
    for lists that do not fit each other.
    """
    model = check_retrieval(model)
    if not isinstance(captions, (list, tuple)) or not all(
        isinstance(own, (list, tuple)) for own in captions
    ):
        raise InputError(f"captions must be a list of lists of str, got {captions!r:.80}")
    if not isinstance(images, (list, tuple)) and getattr(images, "ndim", 0) != 4:
        raise InputError(
            f"images must be a list, or one tensor or array of images, got {type(images).__name__}"
        )
    if len(images) != len(captions):
        raise InputError(
            f"every image has a list of captions, got {len(images)} images and {len(captions)} lists"
        )
    for index, own in enumerate(captions):
        for number, text in enumerate(own):
            check_words(text, f"caption {number} of image {index}")
    texts = [text for own in captions for text in own]
    owner = [index for index, own in enumerate(captions) for _ in own]
    vision = model.encode_image(images, processor=processor, batch_size=batch_size)
    language = model.encode_text(texts, processor=processor)
    return recall(vision, language, owner, ks)


def _found(
    rows: Tensor, others: Tensor, row_owner: Tensor, other_owner: Tensor, ks: Sequence[int]
) -> dict[int, float]:
    most = min(max(ks), len(others))
    step = max(1, _SCORES_AT_ONCE // len(others))
    hits = []
    for start in range(0, len(rows), step):
        own = slice(start, start + step)
        nearest = (rows[own] @ others.T).topk(most, dim=1).indices
        hits.append(other_owner[nearest] == row_owner[own, None])
    hit = torch.cat(hits)
    return {k: float(hit[:, :k].any(1).float().mean()) for k in ks}
