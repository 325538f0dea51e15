"""The embedding of images is a module: whoever hooks into its calls or replaces it is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import backbone, images
from torch import Tensor, nn


def _hooked(model: Any, seen: list[int]) -> None:
    model.vision_embed.register_forward_hook(lambda _, given, y: seen.append(len(y)))


def _overridden(model: Any, seen: list[int]) -> None:
    real = model.vision_embed.forward

    def forward(*given: Any, **options: Any) -> Tensor:
        y: Tensor = real(*given, **options)
        seen.append(len(y))
        return y

    model.vision_embed.forward = forward


class _Wrapper(nn.Module):
    """What a user may put in its place: the call of it and the size of its grid."""

    def __init__(self, inner: Any, seen: list[int]) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def grid_size(self, pictures: Tensor) -> tuple[int, int]:
        found: tuple[int, int] = self.inner.grid_size(pictures)
        return found

    def forward(self, *given: Any) -> Tensor:
        y: Tensor = self.inner(*given)
        self.seen.append(len(y))
        return y


def _replaced(model: Any, seen: list[int]) -> None:
    model.vision_embed = _Wrapper(model.vision_embed, seen)


@pytest.mark.parametrize("watch", [_hooked, _overridden, _replaced])
def test_whoever_watches_is_asked(watch: Callable[[Any, list[int]], None]) -> None:
    model, pictures = backbone(), images(3)
    seen: list[int] = []
    with torch.no_grad():
        wanted = model(visual_tokens=pictures)
        watch(model, seen)
        found = model(visual_tokens=pictures)
    assert seen == [3, 3]  # with positions, and the words
    for name in ("encoder_out", "encoder_embedding"):
        assert torch.equal(found[name], wanted[name])
