"""Layers whose samples threads take through all of them alone (on AMX): when, and that the numbers are those of the single ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_cases import OPS
from test_row_statistics import Layers
from torch import Tensor

from beit3_fast.ops import MASKS
from beit3_fast.ops.whole_layer import encoder_layers

FORMS = ["fp32", "bf16", "int8, bf16", "int8, fp32"]
SENTENCES = [9, 31, 0, 14, 22, 5, 17, 40, 1, 12, 33, 8, 26, 0, 19, 3, 28, 11, 16, 7, 30, 13]
# Lengths of vision and text, of samples that share evenly.
ALONE: dict[str, tuple[list[int], list[int], int]] = {
    "images, two threads": ([71] * 4, [0] * 4, 2),
    "sentences, two threads": ([0] * 22, SENTENCES, 2),
    "sentences, one thread": ([0] * 22, SENTENCES, 1),
    "an image of more rows than a block, one thread": ([60, 0, 601, 3], [0] * 4, 1),
}
TOGETHER: dict[str, tuple[list[int], list[int], int]] = {
    "pairs": ([70] * 4, [12] * 4, 2),
    "images and sentences": ([70] * 4 + [0], [0] * 4 + [30], 2),
    "one image more for a thread": ([90] * 5, [0] * 5, 2),
    "few rows": ([30] * 4, [0] * 4, 2),
    "more threads than samples": ([200] * 2, [0] * 2, 3),
}


def alone(case: Layers, mask: str = "bidirectional") -> Tensor | None:
    """The layers at once, if there may be so many rows because samples are taken alone."""
    how: dict[str, Any] = {"mask": mask, "last": case.last, "impl": "cpu", "most_rows": 1}
    return encoder_layers(case.x, case.operands, case.layout, **how)


def has_tiles() -> bool:
    return bool(OPS.cpu_isa() == "amx_bf16")


@pytest.mark.parametrize("lengths", ALONE)
@pytest.mark.parametrize("form", FORMS)
def test_samples_alone(form: str, lengths: str) -> None:
    *samples, threads = ALONE[lengths]
    torch.set_num_threads(threads)
    case = Layers.random(form, 128, 2, *samples)
    y = alone(case)
    assert (y is not None) == has_tiles()
    if y is not None:
        assert torch.equal(y, case.one_by_one())


@pytest.mark.parametrize("lengths", TOGETHER)
def test_samples_together(lengths: str) -> None:
    *samples, threads = TOGETHER[lengths]
    torch.set_num_threads(threads)
    case = Layers.random("bf16", 128, 2, *samples)
    assert alone(case) is None
    assert torch.equal(case.at_once(), case.one_by_one())


def test_heads_that_are_no_strips() -> None:
    torch.set_num_threads(2)
    case = Layers.random("bf16", 128, 4, [71] * 4, [0] * 4)
    assert alone(case) is None


def test_rows_of_several_experts() -> None:
    torch.set_num_threads(2)
    case = Layers.random("bf16", 128, 2, [71] * 4, [0] * 4)
    two, one = (0, 100, 284), (0, 284, 284)
    for bounds, ffn_bounds in ((two, two), (two, one), (one, two)):
        shapes = {"bounds": bounds, "own_bounds": bounds, "ffn_bounds": ffn_bounds}
        layers = [own._replace(**shapes) for own in case.operands]
        own = case._replace(operands=layers)
        assert alone(own) is None
    y = alone(case._replace(operands=[own._replace(ffn_bounds=one) for own in case.operands]))
    assert (y is not None) == has_tiles()


@pytest.mark.parametrize(
    "samples", [([0] * 22, SENTENCES), ([71] * 2, [0] * 2)], ids=["text", "vision"]
)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, samples: tuple[list[int], list[int]]) -> None:
    torch.set_num_threads(1)
    case = Layers.random("bf16", 128, 2, *samples)
    y = alone(case, mask)
    assert (y is not None) == has_tiles()
    assert y is None or torch.equal(y, case.one_by_one(mask))


def test_rows_that_lie_apart_and_the_layers_without_a_norm() -> None:
    torch.set_num_threads(2)
    case = Layers.random("bf16", 128, 2, [71] * 4, [0] * 4)
    wide = torch.randn(len(case.x), 256).bfloat16()
    wide[:, 64:192] = case.x
    before = wide.clone()
    own: dict[str, Any] = {"impl": "cpu"}
    y = encoder_layers(wide[:, 64:192], case.operands, case.layout, **own)
    assert y is not None
    assert torch.equal(y, encoder_layers(case.x, case.operands, case.layout, **own))
    assert torch.equal(wide, before)
    x: Tensor | None = case.x
    for operands in case.operands:
        assert x is not None
        x = encoder_layers(x, [operands], case.layout, **own)
    assert torch.equal(y, x)
