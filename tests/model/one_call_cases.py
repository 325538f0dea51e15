"""Whether layers are computed in one call of the compiled library, and what they give when they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beit3_fast.model import caption_cache
from beit3_fast.ops import whole_layer
from beit3_fast.ops.packed_weight import pack, quantize


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, whole: bool) -> Iterator[list[bool]]:
    """Whether each layer was computed in one call, of itself or of several; with ``whole=False`` none is."""
    seen: list[bool] = []

    def spy(real: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def run(x: Tensor, layers: Any, *given: Any, **options: Any) -> Tensor | None:
            y = real(x, layers, *given, **options) if whole else None
            seen.extend([y is not None] * (len(layers) if isinstance(layers, list) else 1))
            return y

        return run

    with monkeypatch.context() as patch:
        patch.setattr(whole_layer, "encoder_layers", spy(whole_layer.encoder_layers))
        patch.setattr(caption_cache, "decoder_layer", spy(caption_cache.decoder_layer))
        yield seen


def both(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], Tensor], layers: int
) -> tuple[Tensor, Tensor]:
    """What ``run`` returns when all its layers are computed in one call each, and when none is."""
    with watched(monkeypatch, whole=True) as seen:
        whole = run()
    assert seen == [True] * layers
    with watched(monkeypatch, whole=False):
        apart = run()
    return whole, apart


def in_form(model: nn.Module, form: str) -> Any:
    """The model in a dtype, with plain, packed or int8 weights."""
    dtype = torch.bfloat16 if "bf16" in form else torch.float32
    model = model.to(dtype).eval()
    make = {"int8": partial(quantize, dtype=dtype), "packed": pack}.get(form.split(", ")[0])
    for module in model.modules():
        if make is not None and isinstance(module, nn.Linear):
            module.weight = make(module.weight)
    return model
