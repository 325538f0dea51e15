"""A whole model with impl="cuda": on a GPU its kernels, without one the kernels' own sources in the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from cuda_cases import DEVICE, EMULATED, compiled, take
from torch import Tensor

from beit3_fast.generate import Special
from beit3_fast.model import create_model
from beit3_fast.model.decoding import CaptionDecoder
from beit3_fast.ops import dispatch
from beit3_fast.parity import op_parity


@cache
def emulated_ops() -> Any:
    """The binding in front of the emulated kernels."""
    emulated = pytest.importorskip("emulated")
    links = [emulated.library(name) for name in EMULATED]
    path = compiled(("emulated_launchers.cpp",), "beit3_fast_emulated", links)
    torch.ops.load_library(str(path))
    return torch.ops.beit3_fast_emulated


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        take(emulated_ops(), monkeypatch)
    yield
    dispatch.reset()


@torch.no_grad()
def rows(impl: str, mask: str, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 128, "num_heads": 2, "ffn_dim": 256, "num_layers": 2}
    model: Any = create_model("beit3_tiny_patch16_32", impl=impl, **sizes)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    # Weights as bf16 holds them, in whatever dtype they are then used.
    model = model.bfloat16().to(dtype).to(DEVICE)
    images = [torch.randn(3, 32, 32).bfloat16().to(DEVICE, dtype), None]
    text = [torch.arange(5, device=DEVICE) + 7, torch.arange(3, device=DEVICE) + 2]
    found: Tensor = model.forward_packed(images, text, mask=mask).rows
    return found.cpu()


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mask", ["seq2seq", "bidirectional"])
def test_a_model_is_as_near_the_truth_as_composite(mask: str) -> None:
    truth = rows("reference", mask, torch.float64)
    plain = rows("composite", mask, torch.bfloat16)
    parity = op_parity(rows("cuda", mask, torch.bfloat16), plain, truth)
    assert parity.passed, parity.reason


@torch.no_grad()
def caption_rows(impl: str, dtype: torch.dtype) -> Tensor:
    """Log probabilities of the best words of three steps of two captions an image."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 128, "num_heads": 2, "ffn_dim": 128, "num_layers": 2}
    model: Any = create_model("beit3_tiny_patch16_32_captioning", impl=impl, **sizes)
    model = model.bfloat16().to(dtype).to(DEVICE)
    images = torch.randn(2, 3, 32, 32).bfloat16().to(DEVICE, dtype)
    decoder = CaptionDecoder(model, images, 2, 4, 0, 91)
    special, found = Special(0, 1, 2, 91), []
    rows = decoder.start()[:, None].expand(-1, 2, -1)
    for step in range(3):
        found.append(decoder.likeliest(rows, 6, special)[0])
        words = torch.tensor([[5, 6], [7, 8]], device=DEVICE) + step
        rows = decoder.step(words, torch.tensor([[0, 0], [0, step > 0]], device=DEVICE).long())
    return torch.cat(found).to(torch.float64 if dtype is torch.float64 else torch.float32).cpu()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_steps_of_captions_are_as_near_the_truth_as_composite() -> None:
    truth = caption_rows("reference", torch.float64)
    plain = caption_rows("composite", torch.bfloat16)
    parity = op_parity(caption_rows("cuda", torch.bfloat16), plain, truth)
    assert parity.passed, parity.reason
