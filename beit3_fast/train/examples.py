"""A few predictions on held-out data, as pictures with words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from beit3_fast.data import Tokenizer
from beit3_fast.data.images import load_image
from beit3_fast.data.mixed import MixedData
from beit3_fast.data.pair_batch import PairBatch
from beit3_fast.data.paired import PairedData, token_ids
from beit3_fast.data.presets import ImagePreset
from beit3_fast.data.question_batch import QuestionBatch
from beit3_fast.data.tokenizer import segments

if TYPE_CHECKING:
    from PIL import Image

COUNT = 6
"""Examples of a report."""

_FOUND = 3
_GREY = 128


@dataclass(frozen=True)
class Example:
    """``text`` above ``pictures``, each with a word or two below it."""

    text: str
    pictures: tuple[tuple[Image.Image, str], ...]


@torch.no_grad()
def given_answers(
    model: Any, data: PairedData[QuestionBatch], labels: Sequence[str] | None
) -> list[Example]:
    """Questions of different images, the model's answer, and the right one where that is another, if there is any."""
    rows = list({row.image: row for row in data.rows}.values())[:COUNT]
    asked = PairedData(rows, len(rows), data.processor, data.collate)
    (batch,) = asked.in_order()
    own = batch.to(next(model.parameters()).device)
    model.eval()
    logits = model(image=own.image, question=own.tokens, padding_mask=own.padding)
    examples = []
    for row, given, scores in zip(rows, logits.argmax(1).tolist(), batch.scores, strict=True):
        said = _label(given, labels)
        if not scores[given]:
            right = _label(int(scores.argmax()), labels) if scores.any() else "none is given"
            said += f" (right: {right})"
        text = _sentence(row.text, data.processor.tokenizer)
        examples.append(Example(text, ((load_image(row.image), said),)))
    return examples


@torch.no_grad()
def found_images(
    model: Any, data: PairedData[PairBatch], labels: Sequence[str] | None
) -> list[Example]:
    """Captions of different images and the nearest images, best first."""
    rows = list({row.image: row for row in data.rows}.values())
    processor = data.processor
    ids = [token_ids(row.text, processor.tokenizer) for row in rows[:COUNT]]
    model.eval()
    images = model.encode_image(
        [row.image for row in rows], processor=processor, batch_size=data.batch_size
    )
    texts = segments(ids, processor.max_length, padding=False)["text_tokens"]
    nearest = (model.encode_text(texts) @ images.T).topk(min(_FOUND, len(rows))).indices
    return [
        Example(
            _sentence(row.text, processor.tokenizer),
            tuple(
                (load_image(rows[place].image), "right" if place == own else "") for place in found
            ),
        )
        for own, (row, found) in enumerate(zip(rows[:COUNT], nearest.tolist(), strict=True))
    ]


@torch.no_grad()
def filled_in(model: Any, data: MixedData) -> list[Example]:
    """Pairs with what is hidden and what the model puts there; patches as pixels where the visual tokens have any.

    Empty where the data have no pairs.
    """
    if not data.mix.pair or data.processor.tokenizer is None:
        return []
    model.eval()
    examples: list[Example] = []
    for batch in (data[number] for number in range(COUNT)):
        predicted = model.predict(batch.to(next(model.parameters()).device))
        patches = predicted["pair_image"].predicted.cpu()
        words = iter(predicted["pair_text"].predicted.tolist())
        true = iter(predicted["pair_text"].true.tolist())
        examples += _pairs(batch, patches, words, true, data)
        if len(examples) >= COUNT:
            break
    return examples[:COUNT]


def _pairs(
    batch: Any, patches: Tensor, words: Iterator[int], true: Iterator[int], data: MixedData
) -> list[Example]:
    tokenizer: Any = data.processor.tokenizer
    images, hidden = batch.images[batch.num_images :], batch.hidden_patches[batch.num_images :]
    lengths = batch.text_lengths[: batch.num_pairs]
    texts = batch.tokens.split([*lengths, len(batch.tokens) - sum(lengths)])
    masks = batch.hidden_words.split([*lengths, len(batch.hidden_words) - sum(lengths)])
    own_patches = patches.split(hidden.sum(1).tolist())
    examples = []
    for image, mask, codes, text, covered in zip(
        images, hidden, own_patches, texts[:-1], masks[:-1], strict=True
    ):
        pixels = _pixels(image, data.processor.preset)
        seen = _painted(pixels, mask, None, data)
        pictures = [(_picture(pixels), "image"), (_picture(seen), "seen")]
        centres = getattr(data.visual_tokens, "centres", None)
        if centres is not None:
            filled = _painted(pixels, mask, centres[codes], data)
            pictures.append((_picture(filled), "predicted"))
        said = _filled_text(text, covered, words, true, tokenizer)
        examples.append(Example(said, tuple(pictures)))
    return examples


def _filled_text(
    text: Tensor, covered: Tensor, words: Iterator[int], true: Iterator[int], tokenizer: Tokenizer
) -> str:
    """The sentence; a hidden piece stands in brackets as predicted, and the right one behind it where it is another."""
    parts = []
    for token, is_hidden in list(zip(text.tolist(), covered.tolist(), strict=True))[1:-1]:
        if not is_hidden:
            parts.append(_piece(token, tokenizer))
            continue
        guess, right = _piece(next(words), tokenizer), next(true)
        own = _piece(right, tokenizer)
        parts.append(f"[{guess}]" if guess == own else f"[{guess} (right: {own})]")
    return " ".join(parts)


def _painted(
    pixels: np.ndarray, hidden: Tensor, patches: Tensor | None, data: MixedData
) -> np.ndarray:
    """A copy with the hidden patches grey, or ``patches`` [hidden, 3 * side ** 2] in their places."""
    painted = pixels.copy()
    rows, columns = data.grid
    high, wide = pixels.shape[0] // rows, pixels.shape[1] // columns
    for number, place in enumerate(hidden.nonzero().flatten().tolist()):
        top, left = place // columns * high, place % columns * wide
        own: Any = _GREY
        if patches is not None:
            own = _pixels(patches[number].view(3, high, wide), data.processor.preset)
        painted[top : top + high, left : left + wide] = own
    return painted


def _pixels(image: Tensor, preset: ImagePreset) -> np.ndarray:
    """uint8 [H, W, 3] from a normalised [3, H, W]."""
    mean, std = (torch.tensor(own).view(3, 1, 1) for own in (preset.mean, preset.std))
    scaled = (image.cpu().float() * std + mean).clamp(0, 1) * 255
    return scaled.round().byte().permute(1, 2, 0).numpy()


def _picture(pixels: np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(pixels)


def _piece(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([token]).strip() or "_"


def _sentence(text: str | Sequence[int], tokenizer: Tokenizer | None) -> str:
    if isinstance(text, str):
        return text
    return tokenizer.decode(text) if tokenizer is not None else " ".join(map(str, text))


def _label(answer: int, labels: Sequence[str] | None) -> str:
    """Its name; a model may have more answers than have one."""
    return labels[answer] if labels is not None and answer < len(labels) else str(answer)
