"""Padded tokens [B, N, C] to packed rows and back, with padding anywhere in a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from beit3_fast.layout import TokenLayout


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch lie among packed rows.

    ``vision_source`` and ``text_source`` int64 name the row of [B * Nv] and [B * Nt] behind each packed row;
    None where all rows are kept in their order.
    """

    layout: TokenLayout
    num_vision: int
    num_text: int
    vision_source: Tensor | None = None
    text_source: Tensor | None = None

    @classmethod
    def of(
        cls,
        padding: Tensor | None,
        batch: int,
        num_vision: int,
        num_text: int,
        device: torch.device,
    ) -> Packing:
        """``padding`` bool [B, Nv + Nt], True for padding; None when there is none."""
        if padding is None or not bool(padding.any()):
            layout = TokenLayout.from_lengths([num_vision] * batch, [num_text] * batch, device)
            return cls(layout, num_vision, num_text)
        vision, text = (~padding).split([num_vision, num_text], dim=1)
        vision_lengths, text_lengths = vision.sum(1).tolist(), text.sum(1).tolist()
        layout = TokenLayout.from_lengths(vision_lengths, text_lengths, device)
        order = None
        if layout.order != tuple(range(batch)):
            order = torch.tensor(layout.order, device=device)
        return cls(layout, num_vision, num_text, _source(vision, order), _source(text, order))

    def pack(self, vision: Tensor, text: Tensor) -> Tensor:
        """[B, Nv, C] and [B, Nt, C] -> [R, C]."""
        parts = [
            rows
            for part, source in ((vision, self.vision_source), (text, self.text_source))
            if (rows := _take(part, source)).shape[0]
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else _take(text, None)[:0]

    def unpack(self, rows: Tensor) -> Tensor:
        """[R, C] -> [B, N, C], zeros at padding."""
        batch, split = self.layout.batch_size, self.layout.num_vision_rows
        parts = [
            _put(part, source, batch, tokens)
            for part, source, tokens in (
                (rows[:split], self.vision_source, self.num_vision),
                (rows[split:], self.text_source, self.num_text),
            )
            if tokens
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _source(kept: Tensor, order: Tensor | None) -> Tensor | None:
    """Rows of [B * n] that are kept, samples in the layout's order; ``kept`` bool [B, n]."""
    if order is None and bool(kept.all()):
        return None
    places = torch.arange(kept.numel(), device=kept.device).view_as(kept)
    return places[kept] if order is None else places[order][kept[order]]


def _take(part: Tensor, source: Tensor | None) -> Tensor:
    rows = part.reshape(-1, part.shape[-1])
    return rows if source is None else rows.index_select(0, source)


def _put(rows: Tensor, source: Tensor | None, batch: int, tokens: int) -> Tensor:
    if source is not None:
        padded = rows.new_zeros(batch * tokens, rows.shape[1])
        rows = padded.index_copy(0, source, rows)
    return rows.view(batch, tokens, rows.shape[1])
