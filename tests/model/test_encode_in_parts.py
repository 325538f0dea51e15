"""Large batches are encoded a few samples at a time; nothing but memory may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import TINY, backbone, need
from one_call_cases import in_form
from torch import Tensor

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


def test_many_sentences_are_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where threads take samples through all layers alone (AMX): what lies between kernels does not grow with them."""
    need("cpu")
    size = {"embed_dim": 128, "num_heads": 2, "ffn_dim": 256, "num_layers": 3}
    model = in_form(backbone(TINY.replace(**size)), "packed, bf16")
    lengths = [9, 31, 14, 22, 5, 17, 40, 1, 12, 33, 8, 26, 19, 3, 28, 11, 16, 7, 30, 13]
    words = [torch.randint(0, 100, (length,)) for length in lengths]
    images = [torch.randn(3, 32, 32).bfloat16() for _ in words]
    monkeypatch.setattr(model, "impl", "cpu")
    torch.set_num_threads(2)
    parts: list[int] = []
    in_parts = encoder._encode_in_parts

    def note(own: Any, x: Tensor, *given: Any) -> Tensor:
        parts.append(len(x))
        return in_parts(own, x, *given)

    monkeypatch.setattr(encoder, "_encode_in_parts", note)

    def encode(most: int, read_text: str, *given: Any) -> Tensor:
        parts.clear()
        monkeypatch.setattr(encoder, "_ROWS_AT_ONCE", most)
        with torch.no_grad():
            rows: Tensor = model.forward_packed(*given, words, read_text=read_text).rows
        return rows

    has_tiles = torch.ops.beit3_fast.cpu_isa() == "amx_bf16"
    for read_text in ("all", "first"):
        whole = encode(10**6, read_text, None)
        many = encode(100, read_text, None)
        assert bool(parts) != has_tiles
        assert torch.equal(many, whole)
        encode(100, read_text, images)
        assert parts
