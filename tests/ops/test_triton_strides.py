"""The Triton kernels over many tiles in both directions, every operand in memory of its own width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strided_cases import compare, rounded
from torch import Tensor
from triton_cases import DEVICE

from beit3_fast.kernels import shared_attention as kernels
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import Norm, expert_linear, masked_linear_cross_entropy, shared_attention

SMALL = kernels.Tile(16, 16, 4, 1)
WHOLE = SMALL._replace(whole=128)
Selected = tuple[Any, Any] | None


@pytest.mark.parametrize(
    ("mask", "tile", "selected", "dtype"),
    [
        ("bidirectional", SMALL, None, "fp16"),
        ("seq2seq", WHOLE, None, "fp32"),
        ("causal", SMALL, None, "fp32"),
        ("seq2seq", SMALL, ("first", "all"), "fp32"),
        pytest.param("causal", WHOLE, ("all", "first"), "fp16", marks=pytest.mark.full),
    ],
)
def test_attention(
    mask: str, tile: kernels.Tile, selected: Selected, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five tiles of keys, three or more of queries; a shorter sample ends in the first one."""
    monkeypatch.setattr(kernels._tiles, "choose", lambda *_: tile)
    layouts = [TokenLayout.from_lengths((30, 5), (43, 0), own) for own in ("cpu", DEVICE)]
    selections = [own.select(*selected) for own in layouts] if selected else []
    rows = selections[0].rows if selected else slice(None)
    count = layouts[0].num_rows
    q, k, v = (rounded(dtype, count + i, 32)[:count] for i in range(3))

    def call(impl: str, *qkv: Tensor) -> Tensor:
        place = int(impl == "triton")
        queries = selections[place].layout if selected else None
        how: dict[str, Any] = {"num_heads": 2, "mask": mask, "queries": queries}
        return shared_attention(*qkv, layouts[place], **how, impl=impl)

    compare(call, [q[rows], k, v], rounded(dtype, *q[rows].shape))


@pytest.mark.parametrize(
    ("with_rows", "dtype"),
    [(True, "fp32"), (False, "fp16"), pytest.param(False, "fp32", marks=pytest.mark.full)],
)
def test_linear(with_rows: bool, dtype: str) -> None:
    """Square weights: no stride is another operand's width by chance."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randperm(83, generator=draw)[:, None].repeat(1, 2)[:, 0] if with_rows else None
    operands = [
        rounded(dtype, 83, 72),
        rounded(dtype, 83, 73)[:, :72],
        rounded(dtype, 72, 72, scale=0.1),
        rounded(dtype, 72, 74, scale=0.1)[:, :72],
        *(rounded(dtype, 72 + i)[:72] for i in range(6)),
    ]

    def call(impl: str, x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        w, u, b, c, *norm = parameters
        return expert_linear(
            x,
            [w, u],
            [b, c],
            bounds=(0, 30, 83),
            norm=Norm(norm[:2], norm[2:]),
            activation="gelu",
            residual=residual,
            rows=None if rows is None else rows.to(x.device),
            impl=impl,
        )

    compare(call, operands, rounded(dtype, 83, 75)[:, :72])


def test_head() -> None:
    """Eleven tiles of classes, two of rows."""
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:45]
    targets = torch.arange(45) * 15

    def call(impl: str, *operands: Tensor) -> Tensor:
        index = (own.to(operands[0].device) for own in (rows, targets))
        return masked_linear_cross_entropy(*operands, *index, reduction="none", impl=impl)[:, None]

    operands = [rounded("fp32", *shape) for shape in ((60, 40), (700, 40), (700,))]
    compare(call, operands, rounded("fp32", 45, 1))
