"""Images and token ids become rows of width C, positions included.

Released position tables keep two unused rows in front (a fairseq habit): token t reads row t + 2.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.checkpoint.positions import interpolate_positions
from beit3_fast.config import BEiT3Config
from beit3_fast.derived import derived, needs_grad
from beit3_fast.errors import ShapeError
from beit3_fast.ops import expert_linear
from beit3_fast.ops.dispatch import autocast_enabled

POSITION_OFFSET = 2
MOST_GRIDS = 16  # whose interpolated positions a model keeps
_positions_lock = threading.Lock()


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
        patch = self.patch_size
        if (
            images.dim() != 4
            or images.shape[1] != self.proj.in_channels
            or images.shape[2] % patch
            or images.shape[3] % patch
            or not images.shape[2:].numel()
        ):
            raise ShapeError(
                f"images must be [B, {self.proj.in_channels}, H, W] with H and W positive multiples of "
                f"{patch}, got {list(images.shape)}; resize them (see beit3_fast.Processor)"
            )
        if not images.is_floating_point():
            raise ShapeError(
                f"images must be floating point and normalised, got {images.dtype}; "
                "use beit3_fast.Processor"
            )
        return images.shape[2] // patch, images.shape[3] // patch

    def forward(
        self, images: Tensor, masked_position: Tensor | None = None, impl: str = "auto"
    ) -> Tensor:
        """images [B, 3, H, W] -> [B, Nv, C], class token first, no positions yet.

        ``masked_position`` [B, Nv - 1], bool or 0/1: patches that the mask token replaces.
        """
        rows, columns = self.grid_size(images)
        batch, channels = images.shape[:2]
        patch = self.patch_size
        patches = images.reshape(batch, channels, rows, patch, columns, patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch * rows * columns, channels * patch * patch)
        weight = self.proj.weight
        if images.dtype != weight.dtype and not autocast_enabled(images.device.type):
            raise ShapeError(
                f"images must have the model's dtype, {weight.dtype}, got {images.dtype}; convert them or run "
                "under torch.autocast"
            )
        if needs_grad(weight):
            matrix = weight.flatten(1)
        else:
            matrix = derived("matrix", (weight,), lambda: weight.detach().flatten(1))
        bias = self.proj.bias
        x = expert_linear(
            patches,
            [matrix],
            None if bias is None else [bias],
            bounds=(0, patches.shape[0]),
            impl=impl,
        ).unflatten(0, (batch, rows * columns))
        if masked_position is not None:
            if tuple(masked_position.shape) != (batch, rows * columns):
                raise ShapeError(
                    f"vision_masked_position must be [B, patches] = [{batch}, {rows * columns}], "
                    f"got {list(masked_position.shape)}"
                )
            mask = masked_position.unsqueeze(-1).to(self.mask_token.dtype)
            x = x * (1 - mask) + self.mask_token * mask
        # Under autocast x is of lower precision: the sum of all layers starts in the parameters' dtype.
        return torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1)


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
    return kept[POSITION_OFFSET:]


def text_rows(
    tokens: Tensor, places: Tensor, words: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Embed packed tokens: ids int64 [Rt] and their places in the sentence -> word rows, with positions.

    Raises ShapeError for an id outside the vocabulary (checked on the CPU only) or a sentence longer than the
    position table.
    """
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= words.shape[0]:
            raise ShapeError(
                f"token ids must be in [0, {words.shape[0]}), got ids from {low} to {high}"
            )
        if int(places.min()) + POSITION_OFFSET < 0:
            raise ShapeError(
                f"positions must be rows of the text position table, at least 0, got "
                f"{int(places.min()) + POSITION_OFFSET}"
            )
        if int(places.max()) + POSITION_OFFSET >= table.shape[0]:
            raise ShapeError(
                f"a text may have at most {table.shape[0] - POSITION_OFFSET} tokens, got one of "
                f"{int(places.max()) + 1}; truncate it"
            )
    embedded = F.embedding(tokens, words)
    return embedded, embedded + F.embedding(places + POSITION_OFFSET, table)
