"""The head with softmax and top-k in CUDA C++, emulated: against fp64, with ties, exceptions and odd sizes."""

from __future__ import annotations

import pytest
import torch
from decoding_emulation import EAGER, LATE, RANDOM, choose
from op_cases import DTYPES
from torch import Tensor

# Rows, features, classes, how many are asked for.
SHAPES = {
    "one row": (1, 8, 3, 3),
    "one tile": (5, 72, 256, 9),
    "a class more": (16, 40, 257, 4),
    "three tiles": (17, 64, 700, 15),
    "two tiles of rows": (49, 24, 300, 1),
    "the most": (3, 104, 530, 32),
    "many tiles": (2, 8, 8500, 9),
}


def operands(shape: str, dtype: torch.dtype) -> list[Tensor]:
    """x, rows of a wider tensor full of NaN; weight and bias."""
    rows, features, classes, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(rows + classes)
    wide = torch.full((rows, features + 8), torch.nan)
    wide[:, :features] = torch.randn(rows, features, generator=generator)
    weight = torch.randn(classes, features, generator=generator) * 2 * features**-0.5
    bias = torch.randn(classes, generator=generator)
    return [wide.to(dtype)[:, :features], weight.to(dtype), bias.to(dtype)]


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = x.double() @ weight.double().T
    return logits if bias is None else logits + bias.double()


def assert_best(
    found: tuple[Tensor, Tensor], logits: Tensor, allowed: Tensor | None = None
) -> None:
    """The log probabilities are those of the ids, and no better class was left out."""
    log_p, ids = found
    exact = logits.log_softmax(1)
    torch.testing.assert_close(log_p.double(), exact.gather(1, ids), rtol=1e-5, atol=2e-5)
    if allowed is not None:
        exact = exact.masked_fill(~allowed, -torch.inf)
    best = exact.topk(ids.shape[1], dim=1).values
    torch.testing.assert_close(log_p.double(), best, rtol=1e-5, atol=2e-5)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(shape: str, dtype: str) -> None:
    x, weight, bias = operands(shape, DTYPES[dtype])
    given = None if shape == "one tile" else bias
    found = choose(x, weight, given, SHAPES[shape][3])
    assert_best(found, logits_of(x, weight, given))


def test_what_is_not_allowed_counts_and_is_not_chosen() -> None:
    x, weight, bias = operands("three tiles", torch.bfloat16)
    logits = logits_of(x, weight, bias)
    allowed = torch.ones(700, dtype=torch.bool)
    allowed[logits.topk(5, dim=1).indices.flatten()] = False
    allowed[256:512] = False
    log_p, ids = choose(x, weight, bias, 15, allowed)
    assert allowed[ids].all()
    assert_best((log_p, ids), logits, allowed)


def test_equals_come_in_the_order_of_their_classes() -> None:
    """Every third class has the same row of weights; zero comes with both signs."""
    x = torch.ones(2, 8, dtype=torch.float16)
    x[1] = 0.0
    weight = torch.zeros(600, 8, dtype=torch.float16)
    weight[::3], weight[1::3] = 0.5, -0.0
    bias = torch.zeros(600, dtype=torch.float16)
    bias[::2] = -0.0
    _, ids = choose(x, weight, bias, 12)
    assert ids[0].tolist() == list(range(0, 36, 3))
    assert ids[1].tolist() == list(range(12))


def test_infinity_and_nan_are_what_they_are_in_pytorch() -> None:
    x, weight, _ = operands("a class more", torch.bfloat16)
    bias = torch.zeros(257, dtype=torch.bfloat16)
    bias[:250] = -torch.inf
    log_p, ids = choose(x, weight, bias, 4)
    assert (ids >= 250).all()
    assert_best((log_p, ids), logits_of(x, weight, bias))
    bias[256] = torch.nan
    log_p, ids = choose(x, weight, bias, 4)
    assert ids[:, 0].eq(256).all()
    assert log_p.isnan().all()


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight, bias = operands("two tiles of rows", torch.bfloat16)
    whole = choose(x, weight, bias, 7)
    x[1:48] = torch.nan
    for now, before in zip(choose(x, weight, bias, 7), whole, strict=True):
        assert torch.equal(now[[0, 48]], before[[0, 48]])


def test_the_order_of_events_changes_no_bit() -> None:
    x, weight, bias = operands("a class more", torch.float16)
    first = choose(x, weight, bias, 5)
    for order, seed in ((EAGER, 0), (LATE, 0), (RANDOM, 3)):
        again = choose(x, weight, bias, 5, order=order, seed=seed)
        assert all(torch.equal(*pair) for pair in zip(again, first, strict=True))


def test_what_the_kernels_do_not_take_is_named() -> None:
    x, weight, bias = operands("one tile", torch.bfloat16)
    with pytest.raises(AssertionError, match="counts from 1 to 32"):
        choose(x, weight, bias, 33)
    with pytest.raises(AssertionError, match="at most as many as there are classes"):
        choose(x, weight[:4].clone(), bias[:4], 5)
    with pytest.raises(AssertionError, match="features in multiples of 8"):
        choose(x[:, :12].contiguous(), weight[:, :12].contiguous(), bias, 3)
    with pytest.raises(AssertionError, match="begin at multiples of 16 bytes"):
        choose(x[:, 4:68], weight[:, :64].contiguous(), bias, 3)
