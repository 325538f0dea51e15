"""expert_linear where its loops turn over: blocks and tiles of rows, slices and blocks of depth, groups of panels.

Where these lie depends on the level; the sizes are those of AMX, whose loops have the most of them.
"""

from __future__ import annotations

import pytest
import torch
from cpu_cases import DTYPES, Linear
from test_cpu_int8 import Int8Linear

SHAPES = {
    "one tile, two slices": (16, 1056, 40),
    "a row more than a tile": (33, 520, 17),
    "two blocks of depth": (40, 900, 40),
    "slices, the last chunk begun": (49, 1100, 48),
    "blocks of rows, slices": (900, 2100, 33),
    "more rows than any block": (1100, 100, 70),
    "two groups of panels in slices": (40, 1088, 1100),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(shape: str, dtype: str) -> None:
    for case in range(4):
        gelu, residual = bool(case & 1), bool(case & 2)
        given = Linear(
            DTYPES[dtype],
            SHAPES[shape],
            experts=1 + case % 2,
            norm=case != 0,
            activation="gelu" if gelu else "none",
            residual=residual,
            gather=case == 3,
            packed=case != 2,
            seed=case,
        )
        given.check()
        one = given.run()
        torch.set_num_threads(3)
        assert torch.equal(given.run(), one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_in_int8(shape: str, dtype: str) -> None:
    rows, inner, outer = SHAPES[shape]
    for residual in (False, True):
        Int8Linear(
            DTYPES[dtype],
            (rows, 2 * inner, outer),
            experts=2,
            norm=False,
            residual=residual,
            activation="none" if residual else "gelu",
        ).check()
