"""What the tasks take: images and texts in any form, or tensors that are ready for the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from beit3_fast.data import Processor
from beit3_fast.data.index_files import check_words
from beit3_fast.data.tokenizer import EOS, PAD
from beit3_fast.errors import ConfigError, InputError, ShapeError
from beit3_fast.model.batch import branch


def listed(images: Any) -> list[Any]:
    """One image or many as a list; a tensor or array of four dimensions is a batch."""
    if getattr(images, "ndim", 0) == 4:
        images = list(images)
    items = list(images) if isinstance(images, (list, tuple)) else [images]
    if not items:
        raise InputError("expected at least one image, got none")
    return items


def is_image_batch(images: Any) -> bool:
    """Whether these are images that are ready for the model, in one tensor."""
    return isinstance(images, Tensor) and images.dim() == 4 and images.is_floating_point()


def image_batch(backbone: Any, images: Tensor, processor: Processor | None) -> Tensor:
    """[B, 3, H, W] on the model's device and in its dtype. Raises InputError where B is 0."""
    check_processor(processor)
    if not images.shape[0]:
        raise InputError("expected at least one image, got none")
    weight = branch(backbone, "vision_embed").proj.weight
    return images.to(weight.device, weight.dtype)


def image_tensors(
    backbone: Any, images: list[Any], processor: Processor | None, first: int = 0
) -> list[Tensor]:
    """[3, H, W] each, on the model's device and in its dtype.

    A floating-point tensor is taken for model input, normalised already; everything else goes through the
    processor. ``first`` is the number of the first image in the caller's list, for messages. Raises InputError for what
    cannot be used, ConfigError where a processor is needed and missing.
    """
    check_processor(processor)
    weight = branch(backbone, "vision_embed").proj.weight
    out = []
    for index, image in enumerate(images, first):
        if not (isinstance(image, Tensor) and image.is_floating_point()):
            if processor is None:
                raise ConfigError(
                    f"image {index} is {_named(image)}; pass processor=Processor.for_model(model, ...), or "
                    "normalised floating-point tensors [3, H, W]"
                )
            image = _processed(processor, image, index, first + len(images))
        if image.dim() != 3:
            raise ShapeError(f"image {index} must be [3, H, W], got {list(image.shape)}")
        out.append(image.to(weight.device, weight.dtype))
    return out


def image_batches(
    backbone: Any, images: list[Any], processor: Processor | None, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Images of one size, at most ``batch_size`` at a time: their places in the list, and [S, 3, H, W]."""
    check_batch_size(batch_size)
    waiting: dict[torch.Size, tuple[list[int], list[Tensor]]] = {}
    for start in range(0, len(images), batch_size):
        part = image_tensors(backbone, images[start : start + batch_size], processor, start)
        for place, image in enumerate(part, start):
            places, tensors = waiting.setdefault(image.shape, ([], []))
            places.append(place)
            tensors.append(image)
            if len(places) == batch_size:
                yield places, torch.stack(tensors)
                del waiting[image.shape]
    for places, tensors in waiting.values():
        yield places, torch.stack(tensors)


def text_tensors(
    texts: str | Sequence[str] | Sequence[Tensor] | Tensor,
    processor: Processor | None,
    device: torch.device,
) -> list[Tensor]:
    """Token ids int64 [Nt] each, bos and eos included, without padding.

    ``texts`` are strings, or ids: int64 [B, Nt] or [Nt], or a list of tensors [Nt], of which padding behind eos is cut
    off. Raises InputError for texts without words, ShapeError, and ConfigError for strings without a tokenizer.
    """
    check_processor(processor)
    given: Any = texts
    if isinstance(texts, str) or (isinstance(texts, Tensor) and texts.dim() == 1):
        given = [texts]
    elif isinstance(texts, Tensor) and texts.dim() == 2:
        given = list(texts)
    if not isinstance(given, (list, tuple)) or not given:
        raise InputError(f"expected a text or a list of at least one, got {_named(given)}")
    if all(isinstance(text, Tensor) for text in given):
        for index, tokens in enumerate(given):
            if tokens.dim() != 1 or tokens.dtype != torch.int64 or not len(tokens):
                raise ShapeError(
                    f"text {index} must be token ids, int64 [Nt] with bos and eos, got {tokens.dtype} of shape "
                    f"{list(tokens.shape)}"
                )
        return _without_padding([tokens.to(device) for tokens in given])
    if processor is None or processor.tokenizer is None:
        raise ConfigError(
            "texts need a tokenizer; pass processor=Processor.for_model(model, 'beit3.spm'), or token ids as int64 "
            "tensors [Nt]"
        )
    for index, text in enumerate(given):
        check_words(text, f"text {index}")
    batch = processor.tokenizer(given, processor.max_length, padding=False)
    return [tokens.to(device) for tokens in batch["text_tokens"]]


def _without_padding(texts: list[Tensor]) -> list[Tensor]:
    # of all texts at once: a device is waited for once
    if not bool((torch.cat(texts) == PAD).any()):
        return texts
    return [tokens[: _end_of_text(tokens.tolist())] for tokens in texts]


def _end_of_text(tokens: list[int]) -> int:
    """Where padding begins, if that is behind eos: such ids may be anything else where there is none."""
    end = len(tokens)
    while end and tokens[end - 1] == PAD:
        end -= 1
    return end if end and tokens[end - 1] == EOS else len(tokens)


def check_batch_size(batch_size: Any) -> None:
    """Raises ConfigError unless it is a positive integer."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"batch_size must be a positive integer, got {batch_size!r}")


def check_processor(processor: Any) -> None:
    """Raises ConfigError unless it is a Processor or None."""
    if processor is not None and not isinstance(processor, Processor):
        raise ConfigError(
            f"processor must be a beit3_fast.Processor, got {type(processor).__name__}; make one with "
            "Processor.for_model(model, 'beit3.spm')"
        )


def _processed(processor: Processor, image: Any, index: int, count: int) -> Tensor:
    try:
        tensor: Tensor = processor(images=[image])["image"][0]
    except InputError as error:
        detail = str(error).removeprefix("image 0: ")
        raise InputError(f"image {index}: {detail}" if count > 1 else detail) from error
    return tensor


def _named(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}, {list(value.shape)}"
    if isinstance(value, (list, tuple)) and not value:
        return f"an empty {type(value).__name__}"
    return f"a {type(value).__name__}"
