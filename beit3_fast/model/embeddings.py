"""encode_image, encode_text and encode_pair: the rows that a model makes of its inputs, for every model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from beit3_fast.data import Processor
from beit3_fast.errors import ConfigError, InputError
from beit3_fast.layout import Pick
from beit3_fast.model.drop_path import without_drop_path
from beit3_fast.model.inputs import (
    check_batch_size,
    image_batch,
    image_tensors,
    is_image_batch,
    listed,
    text_tensors,
)

OUTPUTS = ("pooled", "cls", "tokens")


class Embeddings:
    """The three methods, for the backbone and every task model.

    ``pooled`` is what the model was trained to be compared or judged by: the unit embedding of the retrieval models
    (images and texts apart), the pooler's row of the VQA models (pairs). Everywhere else it is the mean of the rows.
    ``cls`` is the class token's row (images, pairs) or that of the beginning of the text. ``tokens`` are all rows. Drop
    path does not act, whatever mode the model is in.
    """

    @property
    def backbone(self) -> Any:
        """The BEiT3 inside."""
        return getattr(self, "beit3", self)

    def encode_image(
        self,
        images: Any,
        output: str = "pooled",
        *,
        processor: Processor | None = None,
        batch_size: int = 32,
    ) -> Any:
        """Embed images by themselves.

        ``images``: one or a list, of any sizes; see ``BEiT3ForCaptioning.caption`` for the kinds. Returns [B, C] in the
        model's dtype and on its device, or for "tokens" a list of B tensors [Nv, C]. Nothing is kept for gradients.
        Up to ``batch_size`` images in one normalised tensor [B, 3, H, W] are one graph for torch.compile, for every B.
        Raises ConfigError, InputError and ShapeError for what cannot be used.
        """
        _check(output, batch_size)
        if is_image_batch(images):
            batch = image_batch(self.backbone, images, processor)
            whole = batch.shape[0] <= batch_size
            cut = [batch] if whole else batch.split(batch_size)
            return _joined([self._encoded("image", output, own, None) for own in cut])
        sources = listed(images)
        parts = []
        for start in range(0, len(sources), batch_size):
            tensors = image_tensors(
                self.backbone, sources[start : start + batch_size], processor, start
            )
            parts.append(self._encoded("image", output, tensors, None))
        return _joined(parts)

    def encode_text(
        self,
        texts: str | Sequence[str] | Sequence[Tensor] | Tensor,
        output: str = "pooled",
        *,
        processor: Processor | None = None,
        batch_size: int = 256,
    ) -> Any:
        """Embed texts by themselves.

        ``texts``: one or a list of strings, which need a ``processor`` with a tokenizer, or token ids int64 [Nt] with
        bos and eos; padding behind them is cut off. Returns [B, C], or for "tokens" a list of B tensors [Nt, C]. Raises
        ConfigError, InputError and ShapeError for what cannot be used.
        """
        _check(output, batch_size)
        tensors = text_tensors(texts, processor, self._device())
        parts = [
            self._encoded("text", output, None, tensors[start : start + batch_size])
            for start in range(0, len(tensors), batch_size)
        ]
        return _joined(parts)

    def encode_pair(
        self,
        images: Any,
        texts: str | Sequence[str] | Sequence[Tensor] | Tensor,
        output: str = "pooled",
        *,
        processor: Processor | None = None,
        batch_size: int = 32,
    ) -> Any:
        """Embed images together with one text each: every row has seen both.

        Arguments as for ``encode_image`` and ``encode_text``, equally many images and texts. Returns [B, C], or for
        "tokens" a list of B tensors [Nv + Nt, C], the image's rows first. Raises ConfigError, InputError and
        ShapeError for what cannot be used.
        """
        _check(output, batch_size)
        sources = listed(images)
        tensors = text_tensors(texts, processor, self._device())
        if len(sources) != len(tensors):
            raise InputError(
                f"a pair is an image and a text, got {len(sources)} images and {len(tensors)} texts"
            )
        parts = []
        for start in range(0, len(sources), batch_size):
            own = slice(start, start + batch_size)
            vision = image_tensors(self.backbone, sources[own], processor, start)
            parts.append(self._encoded("pair", output, vision, tensors[own]))
        return _joined(parts)

    @torch.no_grad()
    @without_drop_path()
    def _encoded(
        self,
        kind: str,
        output: str,
        images: list[Tensor] | Tensor | None,
        texts: list[Tensor] | None,
    ) -> Any:
        head = self._pooling_head(kind) if output == "pooled" else None
        first = output == "cls" or head is not None
        vision: Pick = "none" if images is None else "first" if first else "all"
        text: Pick = (
            "none" if texts is None or (kind == "pair" and first) else "first" if first else "all"
        )
        if isinstance(images, Tensor):
            encoded = self.backbone.encode(images, read_vision=vision)
        else:
            encoded = self.backbone.forward_packed(
                images, texts, read_vision=vision, read_text=text
            )
        if first:
            rows = encoded.text() if images is None else encoded.vision()
            return rows if head is None else head(rows)
        if isinstance(images, Tensor):
            tokens = encoded.rows.view(images.shape[0], -1, encoded.rows.shape[1])
            return list(tokens) if output == "tokens" else tokens.mean(1)
        samples = [
            torch.cat([encoded.rows[own] for own in encoded.layout.segments(sample)])
            for sample in range(encoded.layout.batch_size)
        ]
        if output == "tokens":
            return samples
        return torch.stack([rows.mean(0) for rows in samples])

    def _pooling_head(self, kind: str) -> Callable[[Tensor], Tensor] | None:
        """What makes the pooled embedding of this kind of input from its first rows; None: the mean of all rows."""
        return None

    def _device(self) -> torch.device:
        return next(self.backbone.parameters()).device


def _check(output: str, batch_size: int) -> None:
    if output not in OUTPUTS:
        raise ConfigError(f"output must be one of {list(OUTPUTS)}, got {output!r}")
    check_batch_size(batch_size)


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [sample for part in parts for sample in part]
