"""The one-call form of composite attention (accelerators, torch.compile) against the formula."""

from __future__ import annotations

import pytest
import torch

from beit3_fast.composite.shared_attention import padded_attention
from beit3_fast.composite.shared_attention import shared_attention as composite
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import MASKS
from beit3_fast.padded_layout import PaddedLayout
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


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [([5, 5], [0, 0]), ([0, 0, 0], [4, 4, 4])])
def test_equally_long_samples_of_one_modality(
    lengths: tuple[list[int], list[int]], mask: str
) -> None:
    """As one batch, whose mask is that of the modality."""
    layout = TokenLayout.from_lengths(*lengths)
    assert layout.is_uniform
    q, k, v = torch.randn(layout.num_rows, 3 * 12, dtype=torch.float64).chunk(3, dim=1)
    truth = shared_attention(q, k, v, layout, layout, 3, 0.5, mask)
    ours = composite(q, k, v, layout, layout, 3, 0.5, mask)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
def test_padding_of_texts_alone_is_not_seen(mask: str) -> None:
    valid = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    padded = PaddedLayout(2, 0, 4, torch.device("cpu"), valid)
    layout = TokenLayout.from_lengths([0, 0], [4, 2])
    q, k, v = torch.randn(8, 3 * 12, dtype=torch.float64).chunk(3, dim=1)
    real = valid.flatten()
    truth = shared_attention(q[real], k[real], v[real], layout, layout, 3, 0.5, mask)
    ours = composite(q, k, v, padded, padded, 3, 0.5, mask)
    torch.testing.assert_close(ours[real], truth, rtol=1e-12, atol=1e-12)
