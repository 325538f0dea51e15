"""The table of vision positions for another image size.

Rows of ``embed_positions.A.weight`` are: two that nothing reads (positions begin at 2), the class token, then the grid
of patches row by row. The grid is resampled as the official loader does, in fp32: bicubic, ``align_corners=False``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from beit3_fast.errors import CheckpointError

KEY = "encoder.embed_positions.A.weight"
EXTRA_ROWS = 3

Grid = tuple[int, int]


def is_table(name: str) -> bool:
    """True for the name of the vision position table, with or without the backbone's prefix."""
    return name == KEY or name.endswith("." + KEY)


def rows_of(grid: Grid) -> int:
    """Rows of the table for a grid."""
    return grid[0] * grid[1] + EXTRA_ROWS


def square_grid(rows: int) -> Grid | None:
    """The square grid of a table with so many rows, or None when there is none."""
    patches = rows - EXTRA_ROWS
    side = math.isqrt(max(patches, 0))
    return (side, side) if side > 0 and side * side == patches else None


def interpolate_positions(table: Tensor, source: Grid, grid: Grid) -> Tensor:
    """The position table [3 + rows * columns, C] of the grid ``source``, for another grid of (rows, columns).

    The table itself comes back when the grids are equal; else the result is fp32, whatever the dtype of the input,
    and differentiable. Raises CheckpointError when the table is not one of the grid ``source``.
    """
    if table.dim() != 2 or not table.is_floating_point():
        raise CheckpointError(
            f"a position table has two dimensions and a floating dtype, this one has shape "
            f"{list(table.shape)} and dtype {table.dtype}"
        )
    rows, width = table.shape
    if rows_of(source) != rows:
        raise CheckpointError(
            f"a position table for {source[0]}x{source[1]} patches has {rows_of(source)} rows, this one has {rows}"
        )
    if source == grid:
        return table
    values = table.float()
    # the strides of this view, channels innermost, choose the arithmetic inside interpolate: do not tidy it
    image = values[EXTRA_ROWS:].reshape(-1, *source, width).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    patches = resized.permute(0, 2, 3, 1).flatten(1, 2).squeeze(0)
    return torch.cat([values[:EXTRA_ROWS], patches])
