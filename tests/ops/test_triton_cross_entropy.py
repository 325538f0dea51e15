"""masked_linear_cross_entropy in Triton: against the formula in fp64, in parts and slices, and the same logits twice."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cross_entropy_cases import FACTORS, SHAPES, Case, Operands, check, draw
from op_cases import Rotation
from torch import Tensor
from triton_cases import DEVICE, TARGETS, one_target_each

from beit3_fast.composite import masked_linear_cross_entropy as composite
from beit3_fast.kernels import masked_linear_cross_entropy as kernels
from beit3_fast.ops import masked_linear_cross_entropy

ROTATION = Rotation()
ALL_CASES = [
    Case(impl, dtype, shape, **ROTATION.next((impl, dtype), FACTORS))
    for _, shape, (impl, dtype) in product(range(4), SHAPES, TARGETS)
]
CASES = one_target_each(ALL_CASES[: len(SHAPES) * len(TARGETS)])
LONG_CASES = [case for case in ALL_CASES if case not in CASES]
EDGES = kernels.Tile(16, 32, 16, 4, 1)


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Slices of a few classes in the backward pass, and a few tiles, so that small vocabularies have parts."""
    monkeypatch.setattr(composite, "_LOGITS", request.getfixturevalue("case").slices)
    monkeypatch.setattr(composite, "_THINNEST", 40)
    monkeypatch.setattr(kernels, "_tile_of", lambda x: EDGES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_and_gradients(case: Case, slices: None) -> None:
    check(case, DEVICE)


@pytest.mark.full
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_losses_and_gradients_long(case: Case, slices: None) -> None:
    check(case, DEVICE)


def test_a_saturated_softmax_is_exactly_one_in_the_backward_pass() -> None:
    """It is only if the logits come out with the same bits twice: then the certain row's slopes are all zero."""
    own = draw("few of many", inputs="large")
    x, weight, bias, rows = (None if t is None else t.to(DEVICE) for t in own[:4])
    logits = x[rows] @ weight.T + bias
    best = logits.topk(2, dim=1)
    certain = best.values[:, 0] - best.values[:, 1] > 40
    assert certain.any()
    operands = (x, weight, bias, rows, best.indices[:, 0].contiguous())
    _, peaks = kernels.losses(*operands, 0.0, tile=EDGES)
    grad = torch.ones(len(rows), device=DEVICE)
    for own in (slice(0, 517), slice(0, 40), slice(40, 517)):
        slope, _ = kernels.slopes(grad, *operands, peaks, 0.0, own, tile=EDGES)
        assert not slope[certain].abs().gt(1e-17).any()


@pytest.mark.parametrize("parts", [1, 4])
def test_parts_of_the_vocabulary_change_rounding_only(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = draw("few of many")
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: parts)
    x, weight, bias, rows, targets = (None if t is None else t.to(DEVICE) for t in own)
    losses, peaks = kernels.losses(x, weight, bias, rows, targets, 0.1, tile=EDGES)
    expected, expected_peaks = composite.masked_linear_cross_entropy(*own, 0.1)
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(peaks.cpu(), expected_peaks, rtol=1e-5, atol=1e-5)


def test_operands_in_any_memory_order() -> None:
    x, weight, bias, rows, targets = (None if t is None else t.to(DEVICE) for t in draw("primes"))
    expected = masked_linear_cross_entropy(x, weight, bias, rows, targets, impl="triton")

    def every_second(t: Tensor) -> Tensor:
        return torch.stack([t, torch.zeros_like(t)], dim=-1)[..., 0]

    strided = [every_second(t) for t in (x, weight, bias, rows, targets)]
    assert torch.equal(masked_linear_cross_entropy(*strided, impl="triton"), expected)


@pytest.mark.parametrize("impl", ["triton", "composite"])
def test_in_fp16_small_slopes_need_a_scaled_loss(impl: str) -> None:
    """Slopes and gradients are rounded to fp16: below its normal numbers their direction is rounding, and then zero."""
    own = draw("few of many", torch.float16)

    def gradient(operands: Operands, how: str, scale: float) -> Tensor:
        x, weight, bias, rows, targets = operands
        weight = weight.detach().requires_grad_()
        losses = masked_linear_cross_entropy(
            x, weight, bias, rows, targets, reduction="none", impl=how
        )
        (scale * losses.sum()).backward()
        assert weight.grad is not None
        return weight.grad.cpu().double()

    here = own if impl == "composite" else Operands(*(t.to(DEVICE) for t in own))
    double = [None if t is None else t.double() for t in own[:3]]
    truth = gradient(Operands(*double, own.rows, own.targets), "reference", 1.0)

    def turned(found: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(found, truth, dim=1)

    assert turned(gradient(here, impl, 2.0**10)).max() < 1e-4
    unscaled = gradient(here, impl, 2.0**-17)
    assert (unscaled == 0).all(dim=1).any()
    assert turned(unscaled).max() > 0.01
    # No result in fp16 could be right: the gradient itself, rounded once, is not.
    assert turned((truth * 2.0**-17).half().double()).max() > 0.01
