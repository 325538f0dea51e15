"""Large batches are encoded a few samples at a time; nothing but memory may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import beit3_fast
from beit3_fast.layout import TokenLayout
from beit3_fast.model import encoder
from beit3_fast.ops import MASKS


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = beit3_fast.create_model("beit3_tiny_patch16_32")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("read", [("all", "all"), ("first", "first"), ("none", "all")])
def test_parts_give_what_the_whole_gives(
    model: Any, monkeypatch: pytest.MonkeyPatch, mask: str, read: tuple[Any, Any]
) -> None:
    images = [torch.randn(3, 32, 32) if i % 3 != 2 else None for i in range(11)]
    text = [torch.randint(0, 100, (1 + i % 5,)) if i % 3 != 1 else None for i in range(11)]

    def run(rows_at_once: int) -> torch.Tensor:
        monkeypatch.setattr(encoder, "_ROWS_AT_ONCE", rows_at_once)
        with torch.no_grad():
            encoded = model.forward_packed(
                images, text, mask=mask, read_vision=read[0], read_text=read[1]
            )
        return encoded.rows

    whole = run(10**6)
    for rows_at_once in (1, 7, 13, 20):
        torch.testing.assert_close(run(rows_at_once), whole, rtol=1e-5, atol=1e-5)


def test_parts_cover_every_row_once() -> None:
    layout = TokenLayout.from_lengths([4, 0, 3, 4, 1, 0], [2, 5, 0, 3, 0, 1])
    rows = torch.arange(layout.num_rows)
    for most in range(1, 30):
        parts = layout.split(most)
        seen = torch.cat([part.of(rows) for part in parts])
        assert sorted(seen.tolist()) == rows.tolist()
        assert [o for part in parts for o in part.layout.order] == list(layout.order)
        for part in parts:
            assert part.layout.num_rows <= most or part.layout.batch_size == 1
            kinds = list(zip(part.layout.vision_lengths, part.layout.text_lengths, strict=True))
            assert part.layout.image_only == sum(text == 0 for _, text in kinds)
            assert part.layout.text_only == sum(vision == 0 for vision, _ in kinds)
