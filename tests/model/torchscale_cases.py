"""Calls of torchscale's encoder, and the models that answer them: torchscale's, the slim one and the accelerated one."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from _compat import (
    DTYPES,
    SHAPES,
    slim_of,
    torchscale_model,
)
from torch import Tensor

from beit3_fast.integrations.torchscale import accelerate, accelerated_status
from beit3_fast.parity import assert_parity, model_parity

BATCH, TEXT = 3, 7
PADDINGS = ("none", "right", "left", "ragged", "all-but-one")


class Case(NamedTuple):
    """One batch: its mode, where its text is padded, its mask, and what is special about it."""

    mode: str
    padding: str = "none"
    mask: str = "none"
    special: str = ""

    @property
    def img_size(self) -> int:
        return 16 if "patch" in self.special else 48

    def __str__(self) -> str:
        return "-".join(part for part in self if part != "none" and part)


CASES = [
    *(Case("image", mask=mask) for mask in ("none", "causal", "arbitrary")),
    Case("image", special="masked_position"),
    Case("image", special="one_patch"),
    *(Case("text", p, mask) for p in PADDINGS for mask in ("none", "causal", "arbitrary")),
    Case("text", special="positions"),
    Case("text", special="one_token"),
    *(
        Case("pair", p, mask)
        for p in PADDINGS
        for mask in ("none", "seq2seq", "causal", "arbitrary")
    ),
    Case("pair", "right", special="masked_position"),
    Case("pair", special="one_token"),
    Case("pair", special="one_patch"),
    Case("pair", mask="seq2seq", special="one_patch_one_token"),
]
GRADIENT_CASES = [
    Case("image"),
    Case("image", special="masked_position"),
    Case("text", "right"),
    Case("text", "ragged", "causal"),
    Case("pair"),
    Case("pair", "ragged"),
    Case("pair", "right", "seq2seq"),
    Case("pair", "all-but-one", "arbitrary"),
]


def inputs(case: Case, shape: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Keyword arguments of torchscale's ``BEiT3.forward``."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{shape} {case}".encode()))
    call: dict[str, Any] = {}
    num_vision = num_text = 0
    if case.mode != "text":
        size = case.img_size
        image = torch.randn(BATCH, 3, size, size, generator=generator)
        call["visual_tokens"] = image.to(dtype)
        num_vision = (size // 16) ** 2 + 1
    if case.mode != "image":
        num_text = 1 if "one_token" in case.special else TEXT
        call["textual_tokens"] = torch.randint(0, 120, (BATCH, num_text), generator=generator)
        padding = text_padding(case.padding, num_text, generator)
        if padding is not None:
            call["text_padding_position"] = padding
    if case.special == "masked_position":
        masked = torch.rand(BATCH, num_vision - 1, generator=generator) > 0.5
        call["vision_masked_position"] = masked
    if case.special == "positions":
        call["positions"] = torch.arange(5, 5 + num_text)[None]
    tokens = num_vision + num_text
    if case.mask != "none":
        call["attn_mask"] = blocked_mask(case.mask, num_vision, tokens, generator)
    return call


def text_padding(kind: str, num_text: int, generator: torch.Generator) -> Tensor | None:
    """bool [B, Nt], True for padding; every sample keeps a token, the first sample keeps all but for "left"."""
    if kind == "none":
        return None
    places, lengths = torch.arange(num_text)[None], torch.tensor([num_text, 2, 5])[:, None]
    if kind == "right":
        return places >= lengths
    if kind == "left":
        return places < num_text - lengths.flip(0)
    if kind == "all-but-one":
        padding = torch.zeros(BATCH, num_text, dtype=torch.bool)
        padding[1, 1:] = True
        return padding
    padding = torch.rand(BATCH, num_text, generator=generator) > 0.5
    padding[:, 3] = False
    padding[0] = False
    return padding


def blocked_mask(kind: str, num_vision: int, tokens: int, generator: torch.Generator) -> Tensor:
    """int64 [N, N], 1 where blocked; with "arbitrary" every token still sees itself."""
    if kind == "causal":
        return 1 - torch.ones(tokens, tokens, dtype=torch.int64).tril()
    if kind == "arbitrary":
        blocked = (torch.rand(tokens, tokens, generator=generator) > 0.5).long()
        return blocked.fill_diagonal_(0)
    blocked = torch.ones(tokens, tokens, dtype=torch.int64)
    blocked[:, :num_vision] = 0
    num_text = tokens - num_vision
    blocked[num_vision:, num_vision:] = 1 - torch.ones(num_text, num_text).tril().long()
    return blocked


@cache
def expected(case: Case, shape: str, dtype: str) -> dict[str, Any]:
    model, call = torchscale_model(shape, dtype, case.img_size), inputs(case, shape, DTYPES[dtype])
    with torch.no_grad():
        out = model(**call)
        if out["encoder_out"].isnan().any():
            # In fp16 a padded query that sees only padding is NaN, and the next layer spreads it.
            assert dtype == "fp16"
            assert case.mode == "text"
            out["encoder_out"] = without_padding(model, **call)
    return out


def without_padding(
    model: Any, textual_tokens: Tensor, text_padding_position: Tensor, attn_mask: Tensor
) -> Tensor:
    """torchscale's encoder_out, each text on its own with only its real tokens; zeros at padding."""
    samples = []
    for tokens, padding in zip(textual_tokens, text_padding_position, strict=True):
        real = (~padding).nonzero().flatten()
        out = model(
            textual_tokens=tokens[real][None],
            attn_mask=attn_mask[real][:, real],
            positions=real[None] + 2,
        )["encoder_out"]
        samples.append(out.new_zeros(len(tokens), out.shape[2]).index_copy(0, real, out[0]))
    return torch.stack(samples)


@cache
def slim(shape: str, dtype: str, img_size: int) -> Any:
    config = SHAPES[shape].replace(img_size=img_size)
    return slim_of(torchscale_model(shape, dtype, img_size), config)


@cache
def accelerated(shape: str, dtype: str, img_size: int, impl: str) -> Any:
    model = copy.deepcopy(torchscale_model(shape, dtype, img_size))
    return accelerate(model, impl)


def both(shape: str, dtype: str, img_size: int, impl: str) -> Iterator[tuple[str, Any]]:
    model = slim(shape, dtype, img_size)
    model.impl = impl
    yield "slim", model
    model = accelerated(shape, dtype, img_size, impl)
    yield "accelerated", model
    (status,) = accelerated_status(model)
    assert status.obstacle is None
    assert not status.fallback_reasons


def compare(name: str, ours: Tensor, case: Case, shape: str, dtype: str, key: str) -> None:
    """The rule of ``beit3_fast.parity`` on the tokens that are not padding."""
    truth, baseline = expected(case, shape, "fp32"), expected(case, shape, dtype)
    real = ~truth["encoder_padding_mask"].bool()
    parity = model_parity(ours[real], truth[key][real], baseline[key][real])
    assert_parity(parity, f"{name} {key}")
    if key == "encoder_out":
        assert not ours[~real].any(), f"{name}: padded positions must be zero"
