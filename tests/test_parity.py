"""The parity rule accepts honest rounding and catches planted errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from beit3_fast.parity import Parity, assert_parity, model_parity, op_parity, worst_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIXTEEN = [torch.float16, torch.bfloat16]


def product(
    dtype: torch.dtype, rows: int = 64, outlier: bool = False, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """An honest result, plain PyTorch's and the truth of one matrix product, rounded inputs."""
    gen = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 96, generator=gen)
    if outlier:
        x[3] *= 1e4
    w = torch.randn(48, 96, generator=gen) * (scale / math.sqrt(96))
    x, w = x.to(dtype), w.to(dtype)
    truth = x.double() @ w.double().T
    plain = x @ w.T
    # Another order of the sums, in fp32: what a good kernel does.
    honest = (x.float()[:, 48:] @ w.float()[:, 48:].T + x.float()[:, :48] @ w.float()[:, :48].T).to(
        dtype
    )
    return honest, plain, truth


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3.0])
def test_honest_rounding_passes(dtype: torch.dtype, rows: int, outlier: bool, scale: float) -> None:
    outlier = outlier and rows > 3 and dtype != torch.float16
    honest, plain, truth = product(dtype, rows, outlier, scale)
    assert_parity(op_parity(honest, plain, truth))
    assert_parity(op_parity(plain, plain, truth, gradient=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_rounded_plain_result_leaves_room_for_ordinary_rounding(dtype: torch.dtype) -> None:
    _, _, truth = product(dtype)
    plain = truth.to(dtype)
    honest = plain * 1.7 / 1.7
    assert not torch.equal(honest, plain)
    assert_parity(op_parity(honest, plain, truth))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_wrong_row_under_an_outlier_is_caught(dtype: torch.dtype, scale: float) -> None:
    outlier = dtype != torch.float16
    honest, plain, truth = product(dtype, outlier=outlier, scale=scale)
    honest[40] = honest[41]
    verdict = op_parity(honest, plain, truth)
    assert not verdict.passed
    assert "row 40" in verdict.reason


def test_swapped_rows_are_caught_where_the_other_two_rules_are_blind() -> None:
    # An outlier of 1e4 sigma hides unit-size errors from both the largest-error and the rms rule in bf16.
    honest, plain, truth = product(torch.bfloat16, outlier=True)
    honest[[10, 20]] = honest[[20, 10]]
    verdict = op_parity(honest, plain, truth)
    assert not verdict.passed
    assert "2 of 64 rows" in verdict.reason
    assert "largest error" not in verdict.reason
    assert "rms" not in verdict.reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_scaled_output_is_caught(dtype: torch.dtype, scale: float) -> None:
    honest, plain, truth = product(dtype, scale=scale)
    verdict = op_parity(honest * 1.02, plain, truth)
    assert not verdict.passed
    assert "rms" in verdict.reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_is_caught(dtype: torch.dtype) -> None:
    honest, plain, truth = product(dtype)
    honest[7, 5] += 0.25
    verdict = op_parity(honest, plain, truth)
    assert not verdict.passed
    assert "largest error" in verdict.reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unexpected_non_finite_values_fail(dtype: torch.dtype, bad: float) -> None:
    honest, plain, truth = product(dtype)
    honest[2, 1] = bad
    verdict = op_parity(honest, plain, truth)
    assert not verdict.passed
    assert "[2, 1]" in verdict.reason
    # ... also where plain PyTorch fails in the same place.
    plain[2, 1] = bad
    assert not op_parity(honest, plain, truth).passed
    assert not model_parity(honest, truth, product(dtype)[1]).passed


def test_expected_infinity_must_be_there_with_its_sign() -> None:
    truth = torch.tensor([[1.0, 2.0, 1e6], [3.0, -1e6, math.nan]], dtype=torch.float64)
    plain = truth.to(torch.float16)
    assert torch.isinf(plain[0, 2])
    assert_parity(op_parity(plain.clone(), plain, truth))
    for place, value in [((0, 2), 65504.0), ((0, 2), -math.inf), ((1, 2), 0.0)]:
        wrong = plain.clone()
        wrong[place] = value
        assert not op_parity(wrong, plain, truth).passed


def test_infinite_plain_result_does_not_open_the_limit() -> None:
    honest, plain, truth = product(torch.float16)
    plain[0, 0] = math.inf
    assert_parity(op_parity(honest, plain, truth))
    honest[5, 5] += 1.0
    assert not op_parity(honest, plain, truth).passed


def test_gradients_may_err_three_times_forward_two() -> None:
    truth = torch.linspace(1.0, 2.0, 4096, dtype=torch.float64).reshape(64, 64)
    plain = truth.float()
    plain[0, 0] += 1e-3
    ours = truth.float()
    ours[1, 1] += 2.5e-3
    assert not op_parity(ours, plain, truth).passed
    assert "largest error" in op_parity(ours, plain, truth).reason
    assert "largest error" not in op_parity(ours, plain, truth, gradient=True).reason


def test_zero_rows_must_stay_zero() -> None:
    honest, plain, truth = product(torch.bfloat16)
    for t in (honest, plain, truth):
        t[8] = 0.0
    assert_parity(op_parity(honest, plain, truth))
    honest[8] = 1.0
    assert not op_parity(honest, plain, truth).passed


@pytest.mark.parametrize(("size", "judged"), [(1e-36, True), (1e-42, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_subnormal_numbers_have_no_direction(
    dtype: torch.dtype, size: float, judged: bool
) -> None:
    honest, plain, truth = product(dtype)
    for t in (honest, plain, truth):
        t[8] = size
    honest[8] = -size
    verdict = op_parity(honest, plain, truth)
    assert verdict.passed is not judged
    assert not judged or "row 8" in verdict.reason


def test_shape_dtype_and_empty() -> None:
    honest, plain, truth = product(torch.float32)
    assert "shape" in op_parity(honest[:5], plain, truth).reason
    assert "dtype" in op_parity(honest.double(), plain, truth).reason
    assert "shape" in model_parity(honest[:5], plain).reason
    assert "dtype" in model_parity(honest.long(), plain).reason
    assert_parity(op_parity(honest[:0], plain[:0], truth[:0]))
    assert_parity(op_parity(honest[:, :0], plain[:, :0], truth[:, :0]))
    with pytest.raises(ValueError, match="float64"):
        op_parity(honest, plain, truth.float())
    with pytest.raises(ValueError, match="plain"):
        op_parity(honest, plain[:5], truth)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_values_keep_their_direction(size: float) -> None:
    truth = (
        torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * size
    )
    plain = truth.float()
    assert_parity(op_parity(plain.clone(), plain, truth))
    assert not op_parity(plain.roll(1, 0), plain, truth).passed


def test_model_fp32_is_held_to_its_scale() -> None:
    reference = torch.linspace(-4.0, 4.0, 1000)
    assert_parity(model_parity(reference + 3.9e-5, reference))
    verdict = model_parity(reference + 4.5e-5, reference)
    assert not verdict.passed
    assert verdict.max_abs == pytest.approx(4.5e-5, rel=0.02)
    assert not model_parity(reference * 1.0001, reference).passed


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_model_16_bit_is_held_to_the_baseline(dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(1)
    reference = torch.randn(50, 64, generator=gen)
    noise = torch.randn(50, 64, generator=gen)
    baseline = (reference + 0.05 * noise).to(dtype)
    assert_parity(
        model_parity((reference + 0.08 * noise.roll(1, 0)).to(dtype), reference, baseline)
    )
    far = (reference + 0.13 * noise.roll(1, 0)).to(dtype)
    assert not model_parity(far, reference, baseline).passed
    assert_parity(model_parity(far, reference, baseline, gradient=True))
    shifted = reference.to(dtype)
    shifted[3] = shifted[4]
    assert not model_parity(shifted, reference, baseline).passed
    with pytest.raises(ValueError, match="baseline"):
        model_parity(far, reference)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_model_output_that_is_only_rounded_passes_a_perfect_baseline(dtype: torch.dtype) -> None:
    reference = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).to(dtype).float()
    reference[0, 0] += 1e-4
    rounded = reference.to(dtype)
    assert_parity(model_parity(rounded, reference, rounded))
    assert not model_parity(rounded * 1.01, reference, rounded).passed


def test_model_refuses_a_reference_that_can_judge_nothing() -> None:
    good = torch.ones(3)
    for reference, baseline in [(good * math.nan, None), (good, good * math.inf)]:
        with pytest.raises(ValueError, match="not finite"):
            model_parity(good, reference, baseline)


def test_worst_of_and_assert() -> None:
    good = Parity(1e-3, 1e-4, 2e-4, True)
    bad = Parity(2e-3, 5e-4, 1e-4, False, "largest error 2e-3 is over the limit 1e-3")
    both = worst_of({"a": good, "b": bad})
    assert not both.passed
    assert both.reason.startswith("b: largest")
    assert (both.max_abs, both.rel_rms) == (2e-3, 5e-4)
    assert worst_of({"a": good}).passed
    with pytest.raises(ValueError, match="no output"):
        worst_of({})
    broken = worst_of({"a": good, "c": Parity(math.nan, math.nan, math.nan, False, "not finite")})
    assert math.isnan(broken.max_abs)
    assert not broken.passed
    with pytest.raises(AssertionError, match=r"logits is not in parity: .*max_abs 2\.000e-03"):
        assert_parity(both, "logits")
