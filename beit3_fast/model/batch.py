"""From images and texts, padded or ragged, to packed rows, and back to the padded form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.errors import ConfigError, ShapeError
from beit3_fast.layout import TokenLayout
from beit3_fast.model.embedding import (
    POSITION_OFFSET,
    VisionEmbedding,
    text_rows,
    vision_positions,
)
from beit3_fast.model.one_call import is_watched
from beit3_fast.ops import unpack_rows
from beit3_fast.padded_layout import PaddedLayout, shapes_are_fixed


@dataclass(frozen=True)
class Embedded:
    """A batch as packed rows.

    ``rows`` [R, C] have positions added, ``words`` [R, C], where asked for, have not. ``source`` int64 [R] names the row of the
    padded batch [B * N] behind each packed row (None: the same order), N = num_vision + num_text.
    """

    rows: Tensor
    words: Tensor | None
    layout: TokenLayout
    source: Tensor | None = None
    num_vision: int = 0
    num_text: int = 0

    def unpack(self, rows: Tensor) -> Tensor:
        """Packed rows [R, C] -> padded batch [B, N, C], zeros at padding."""
        batch, tokens = self.layout.batch_size, self.num_vision + self.num_text
        if isinstance(self.layout, PaddedLayout):
            return self.layout.unpack(rows)
        if self.source is None:
            return rows.view(batch, tokens, rows.shape[1])
        padded = unpack_rows(rows, self.source, batch * tokens)
        return padded.view(batch, tokens, rows.shape[1])


def embed_padded(
    model: Any,
    image: Tensor | None,
    text: Tensor | None,
    text_padding: Tensor | None = None,
    masked_position: Tensor | None = None,
    positions: Tensor | None = None,
    keep_words: bool = False,
) -> Embedded:
    """Embed a padded batch with the tables of a BEiT3 ``model``, dropping padding.

    image [B, 3, H, W]; text int64 [B, Nt]; text_padding [B, Nt], nonzero for padding, which stays and is masked where
    ``shapes_are_fixed``; masked_position [B, patches]; positions [1 or B, Nt], rows of the text position table;
    ``keep_words`` also returns the rows without positions. Raises ShapeError and ConfigError.
    """
    _check(image, text, text_padding, masked_position, positions)
    first = image if image is not None else text
    assert first is not None
    batch, device = first.shape[0], first.device
    num_vision = num_text = 0
    if image is not None:
        grid = branch(model, "vision_embed").grid_size(image)
        num_vision = grid[0] * grid[1] + 1
    kept = None if text_padding is None else ~text_padding.bool()
    if text is not None:
        num_text = text.shape[1]
    layout: TokenLayout
    if shapes_are_fixed():
        layout = PaddedLayout(batch, num_vision, num_text, device, kept)
        kept = None
    else:
        text_lengths = [num_text] * batch if kept is None else kept.sum(1).tolist()
        layout = TokenLayout.from_lengths([num_vision] * batch, text_lengths, device)
    order = None if layout.in_order else torch.tensor(layout.order, device=device)

    def sorted_samples(tensor: Tensor | None) -> Any:
        return tensor if tensor is None or order is None else tensor[order]

    kept = sorted_samples(kept)
    parts, words = [], []
    if image is not None:
        own = sorted_samples(image), sorted_samples(masked_position)
        placed, plain = _embed_images(model, *own, keep_words)
        parts.append(placed)
        words.append(plain)
    if text is not None:
        places = torch.arange(num_text, device=device)[None]
        if positions is not None:
            places = positions - POSITION_OFFSET
        places = sorted_samples(places.expand(batch, num_text))
        tokens = sorted_samples(text)
        tokens, places = (t.flatten() if kept is None else t[kept] for t in (tokens, places))
        plain, placed = _text_rows(model, tokens, places)
        parts.append(placed)
        words.append(plain)
    source = None
    packed = not isinstance(layout, PaddedLayout)
    if packed and num_text and (image is not None or kept is not None):
        source = _sources(layout, num_vision, num_text, kept)
    kept_words = _cat(words) if keep_words else None
    return Embedded(_cat(parts), kept_words, layout, source, num_vision, num_text)


def embed_samples(
    model: Any, images: Sequence[Tensor | None] | None, text: Sequence[Tensor | None] | None
) -> Embedded:
    """Embed a batch given sample by sample: images [3, H, W] of any size, texts int64 [Nt] of any length.

    None stands for what a sample has not. Raises ShapeError for a sample with neither.
    """
    for name, samples in (("images", images), ("text", text)):
        if samples is not None and not isinstance(samples, (list, tuple, Tensor)):
            raise ShapeError(
                f"{name} must be a list with one entry per sample, got {type(samples).__name__}"
            )
    batch = len(images) if images is not None else len(text) if text is not None else 0
    images = [None] * batch if images is None else images
    text = [None] * batch if text is None else text
    if not batch or len(images) != len(text):
        raise ShapeError(
            "images and text must have one entry per sample (None where there is none), got "
            f"{len(images)} and {len(text)}"
        )
    vision_lengths, text_lengths = [], []
    for index, (image, tokens) in enumerate(zip(images, text, strict=True)):
        if image is None and tokens is None:
            raise ShapeError(f"sample {index} has neither an image nor a text")
        for name, own in (("images", image), ("text", tokens)):
            if own is not None and not isinstance(own, Tensor):
                raise ShapeError(f"{name}[{index}] must be a tensor, got {type(own).__name__}")
        if tokens is not None and (tokens.dim() != 1 or tokens.dtype != torch.int64):
            raise ShapeError(
                f"text[{index}] must be int64 [Nt], got {tokens.dtype} of shape {list(tokens.shape)}"
            )
        grid = (0, 0)
        if image is not None:
            grid = branch(model, "vision_embed").grid_size(image[None])
        vision_lengths.append(0 if image is None else grid[0] * grid[1] + 1)
        text_lengths.append(0 if tokens is None else tokens.shape[0])
    device = next(t for t in (*images, *text) if t is not None).device
    layout = TokenLayout.from_lengths(vision_lengths, text_lengths, device)
    parts: list[Tensor] = []
    same_size: list[Tensor] = []
    for place in (*layout.order, None):
        image = None if place is None else images[place]
        if same_size and (image is None or image.shape != same_size[0].shape):
            parts.append(_vision_rows(model, torch.stack(same_size), None))
            same_size = []
        if image is not None:
            same_size.append(image)
    sentences = [tokens for place in layout.order if (tokens := text[place]) is not None]
    if sentences:
        places = [torch.arange(len(tokens), device=device) for tokens in sentences]
        parts.append(_text_rows(model, torch.cat(sentences), torch.cat(places))[1])
    return Embedded(_cat(parts), None, layout)


def embed_ordered(
    model: Any,
    images: Tensor | None,
    tokens: Tensor | None,
    text_lengths: Sequence[int],
    image_only: int,
    masked_position: Tensor | None = None,
) -> Embedded:
    """Embed a batch that is sorted already: ``image_only`` images, then pairs, then texts.

    images [I + P, 3, H, W] of any size; tokens int64 [Rt], texts of ``text_lengths`` one behind the other;
    masked_position [I + P, patches]. Raises ShapeError where they do not fit each other.
    """
    given = images if images is not None else tokens
    if given is None:
        raise ShapeError("images, tokens or both are needed, got neither")
    seen = 0 if images is None else len(images)
    pairs, read, rows = seen - image_only, len(text_lengths), sum(text_lengths)
    if (
        not 0 <= pairs <= read
        or rows != (0 if tokens is None else len(tokens))
        or 0 in text_lengths
    ):
        raise ShapeError(
            f"{seen} images, of which {image_only} are alone, do not fit {read} texts of {rows} tokens in all, "
            f"got {None if tokens is None else list(tokens.shape)} tokens"
        )
    vision_lengths = [0] * (image_only + read)
    parts = []
    if images is not None:
        grid = branch(model, "vision_embed").grid_size(images)
        vision_lengths[:seen] = [grid[0] * grid[1] + 1] * seen
        parts.append(_vision_rows(model, images, masked_position))
    layout = TokenLayout.from_lengths(
        vision_lengths, [0] * image_only + list(text_lengths), given.device
    )
    if tokens is not None:
        places = torch.cat([torch.arange(length) for length in text_lengths]).to(tokens.device)
        parts.append(_text_rows(model, tokens, places)[1])
    return Embedded(_cat(parts), None, layout)


def packed_choice(chosen: Tensor, text_padding: Tensor | None, layout: TokenLayout) -> Tensor:
    """bool [Rt] in packed order from a mask [B, Nt] over the padded text.

    Raises ShapeError when the mask has another shape than the padding or chooses padding.
    """
    chosen = chosen.bool()
    shape = (layout.batch_size, sum(layout.text_lengths[:1]))
    padding = None
    if text_padding is not None:
        padding, shape = text_padding.bool(), (*text_padding.shape,)
    if tuple(chosen.shape) != shape:
        raise ShapeError(
            f"the mask of text rows to read must have the text's shape {list(shape)}, "
            f"got {list(chosen.shape)}"
        )
    if padding is None:
        return chosen.flatten()
    if bool((chosen & padding).any()):
        sample = int((chosen & padding).any(1).nonzero()[0])
        raise ShapeError(
            f"the mask of text rows to read chooses padding in sample {sample}; clear it where text_padding is set"
        )
    order = torch.tensor(layout.order, dtype=torch.int64, device=chosen.device)
    return chosen[order][~padding[order]]


def branch(model: nn.Module, name: str) -> Any:
    """A model's ``vision_embed`` or ``text_embed``. Raises ConfigError where it was made without."""
    module = model._modules.get(name)
    if module is None:
        kind = "vision" if name == "vision_embed" else "text"
        raise ConfigError(
            f"this model has no {kind} branch, but the batch has {kind} input; create it with "
            "modalities=('vision', 'text')"
        )
    return module


def _vision_rows(model: Any, images: Tensor, masked_position: Tensor | None) -> Tensor:
    return _embed_images(model, images, masked_position, keep_words=False)[0]


def _embed_images(
    model: Any, images: Tensor, masked_position: Tensor | None, keep_words: bool
) -> tuple[Tensor, Tensor]:
    """Rows with positions, and the same without them; without ``keep_words`` both are the rows."""
    embed = branch(model, "vision_embed")
    table = model.encoder.embed_positions.A.weight
    positions = vision_positions(table, model.config.grid_size, embed.grid_size(images))
    _check_masked(masked_position)
    own = (images, masked_position, model.impl)
    plain = isinstance(embed, VisionEmbedding) and not is_watched(embed, VisionEmbedding)
    if keep_words and plain:
        rows, words = embed.with_words(*own, positions)
    else:
        rows = embed(*own, positions)
        words = embed(*own) if keep_words else rows
    return rows.flatten(0, 1), words.flatten(0, 1)


def _text_rows(model: Any, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    words = branch(model, "text_embed").weight
    return text_rows(tokens, places, words, model.encoder.embed_positions.B.weight)


def _sources(layout: TokenLayout, num_vision: int, num_text: int, kept: Tensor | None) -> Tensor:
    tokens = num_vision + num_text
    samples = torch.tensor(layout.order, dtype=torch.int64, device=layout.device)[:, None]
    places = torch.arange(tokens, device=layout.device)[None] + samples * tokens
    text = places[:, num_vision:]
    text = text.flatten() if kept is None else text[kept]
    return torch.cat([places[:, :num_vision].flatten(), text])


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check_masked(masked: Tensor | None) -> None:
    """Raises ShapeError for what is neither 0 nor 1. On a GPU values are not read."""
    if masked is None or masked.dtype is torch.bool or masked.device.type != "cpu":
        return
    if not torch.compiler.is_compiling() and not ((masked == 0) | (masked == 1)).all():
        raise ShapeError("vision_masked_position must be bool or hold 0 and 1 only")


def _check(
    image: Tensor | None,
    text: Tensor | None,
    text_padding: Tensor | None,
    masked_position: Tensor | None,
    positions: Tensor | None,
) -> None:
    if image is None and text is None:
        raise ShapeError("an image, a text or both are needed, got neither")
    named = {"image": image, "text": text, "text_padding": text_padding, "positions": positions}
    for name, value in (named | {"vision_masked_position": masked_position}).items():
        if value is not None and not isinstance(value, Tensor):
            raise ShapeError(f"{name} must be a tensor, got {type(value).__name__}")
    if positions is not None and image is not None:
        raise ConfigError("positions can only be given for a text without an image")
    if masked_position is not None and image is None:
        raise ShapeError("vision_masked_position was given without an image")
    if text is not None and (text.dim() != 2 or text.dtype not in (torch.int64, torch.int32)):
        raise ShapeError(
            f"text must be token ids, int64 [B, Nt], got {text.dtype} of shape {list(text.shape)}"
        )
    if positions is not None and (
        text is None
        or positions.dtype not in (torch.int64, torch.int32)
        or tuple(positions.shape) not in ((1, text.shape[1]), tuple(text.shape))
    ):
        raise ShapeError(
            "positions must be int64 [1 or B, Nt] like the text, got "
            f"{positions.dtype} of shape {list(positions.shape)} and {None if text is None else list(text.shape)}"
        )
    if text_padding is not None and (text is None or text_padding.shape != text.shape):
        raise ShapeError(
            "text_padding must have the text's shape, got "
            f"{list(text_padding.shape)} and {None if text is None else list(text.shape)}"
        )
    if image is not None and text is not None and image.shape[:1] != text.shape[:1]:
        raise ShapeError(
            f"image and text must have the same batch size, got {list(image.shape)} and "
            f"{list(text.shape)}"
        )
