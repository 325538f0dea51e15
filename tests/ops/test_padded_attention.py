"""The one-call form of composite attention (accelerators, torch.compile) against the formula."""

from __future__ import annotations

import pytest
import torch

from beit3_fast.composite.shared_attention import padded_attention
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import MASKS
from beit3_fast.reference.shared_attention import shared_attention

LENGTHS = [
    ([4, 0, 3, 4], [2, 5, 0, 3]),
    ([1], [1]),
    ([5, 5], [0, 0]),
    ([0, 0, 0], [1, 7, 3]),
    ([3, 2], [0, 4]),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_padded_attention_equals_the_formula(
    lengths: tuple[list[int], list[int]], mask: str
) -> None:
    torch.manual_seed(0)
    layout = TokenLayout.from_lengths(*lengths)
    q, k, v = torch.randn(layout.num_rows, 3 * 12, dtype=torch.float64).chunk(3, dim=1)
    truth = shared_attention(q, k, v, layout, layout, 3, 0.5, mask)
    ours = padded_attention(q, k, v, layout, layout, 3, 0.5, mask)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    chosen = torch.arange(layout.num_text_rows) % 2 == 1
    for vision, text in (("first", "first"), ("none", chosen), ("all", "none")):
        rows, own = layout.select(vision, text)
        if len(rows):
            picked = padded_attention(q[rows], k, v, layout, own, 3, 0.5, mask)
            torch.testing.assert_close(picked, truth[rows], rtol=1e-12, atol=1e-12)
