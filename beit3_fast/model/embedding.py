"""Images and token ids become rows of width C, positions included.

Released position tables keep two unused rows in front (a fairseq habit): token t reads row t + 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.checkpoint.positions import interpolate_positions
from beit3_fast.config import BEiT3Config
from beit3_fast.derived import derived, needs_grad, taken
from beit3_fast.errors import ShapeError
from beit3_fast.locks import fork_safe_lock
from beit3_fast.ops.patch_embedding import grid_of, patch_embedding, patch_embedding_and_words

POSITION_OFFSET = 2
MOST_GRIDS = 16  # whose interpolated positions a model keeps
_positions_lock = fork_safe_lock()


class VisionEmbedding(nn.Module):
    """Patches of an image and the class token in front of them; parameters carry the official names."""

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.proj = nn.Conv2d(
            config.in_chans, config.embed_dim, config.patch_size, stride=config.patch_size
        )

    def grid_size(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches. Raises ShapeError unless images is [B, 3, H, W] in whole patches."""
        return grid_of(images, self.proj.weight)

    def forward(
        self,
        images: Tensor,
        masked_position: Tensor | None = None,
        impl: str = "auto",
        positions: Tensor | None = None,
    ) -> Tensor:
        """images [B, 3, H, W] -> [B, Nv, C], class token first.

        ``masked_position`` [B, Nv - 1], bool or 0/1: patches that the mask token replaces. ``positions`` [Nv, C]
        are added where they are given.
        """
        return patch_embedding(images, *self._operands(), positions, masked_position, impl=impl)

    def with_words(
        self, images: Tensor, masked_position: Tensor | None, impl: str, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What ``forward`` gives with ``positions`` [Nv, C] and what it gives without them."""
        own = self._operands()
        return patch_embedding_and_words(images, *own, positions, masked_position, impl=impl)

    def _operands(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        return self.proj.weight, self.proj.bias, self.cls_token[0, 0], self.mask_token[0, 0]


def vision_positions(table: Tensor, trained_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Position rows [Nv, C] of a grid, in the table's dtype; bicubic in fp32 where it is not the trained one."""
    if grid == trained_grid:
        return table[POSITION_OFFSET:]
    if needs_grad(table) or torch.compiler.is_compiling():
        resized = interpolate_positions(table, trained_grid, grid)
        return resized[POSITION_OFFSET:].to(table.dtype)
    tables: dict[Any, Tensor] = derived("positions", (table,), dict)
    kept = tables.get((trained_grid, grid))
    if kept is None:
        with torch.inference_mode(False), torch.no_grad():
            kept = interpolate_positions(table, trained_grid, grid).to(table.dtype)
        with _positions_lock:
            if len(tables) >= MOST_GRIDS:
                tables.pop(next(iter(tables)))
            tables[trained_grid, grid] = kept
    return taken(kept)[POSITION_OFFSET:]


def text_rows(
    tokens: Tensor, places: Tensor, words: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Embed packed tokens: ids int64 [Rt] and their places in the sentence -> word rows, with positions.

    Raises ShapeError for an id outside the vocabulary or a place outside the position table (both checked on the CPU
    only).
    """
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= words.shape[0]:
            raise ShapeError(
                f"token ids must be in [0, {words.shape[0]}), got ids from {low} to {high}"
            )
        first, last = (int(end) + POSITION_OFFSET for end in (places.min(), places.max()))
        if first < 0 or last >= table.shape[0]:
            raise ShapeError(
                f"positions must be rows of the text position table, in [0, {table.shape[0]}), got "
                f"{first} to {last}: a text may have at most {table.shape[0] - POSITION_OFFSET} "
                "tokens; truncate it"
            )
    embedded = F.embedding(tokens, words)
    return embedded, embedded + F.embedding(places + POSITION_OFFSET, table)
