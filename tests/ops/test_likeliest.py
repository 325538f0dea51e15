"""The compiled op that chooses the likeliest classes from logits: against the formula, in odd sizes, with odd numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_cases import DTYPES, need
from torch import Tensor

from beit3_fast.errors import Beit3FastError
from beit3_fast.ops import head_top_k, library
from beit3_fast.ops.head_top_k import _op

pytestmark = pytest.mark.skipif(not library.available(), reason="the library is not compiled")
# Lanes, blocks of 64 and parts of 8192 classes, and one more or less of each.
SIZES = (1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 8191, 8192, 8193, 16_400, 64_010)
NAN, INF = math.nan, math.inf


def likeliest(logits: Tensor, allowed: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _op()(logits, allowed, count)
    return found


def formula(logits: Tensor, allowed: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    log_p = logits.double().log_softmax(1)
    if allowed is not None:
        log_p = log_p.masked_fill(~allowed, -INF)
    best, ids = log_p.sort(dim=1, descending=True, stable=True)
    return best[:, :count], ids[:, :count]


def check(logits: Tensor, allowed: Tensor | None, count: int) -> None:
    log_p, ids = likeliest(logits, allowed, count)
    expected, classes = formula(logits, allowed, count)
    assert torch.equal(ids, classes)
    torch.testing.assert_close(log_p.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_against_the_formula(dtype: str, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = 4 * torch.randn(3, classes + 5, generator=generator)
    # Rows that lie apart, and begin at no line of the cache.
    logits = logits.to(DTYPES[dtype])[:, 3 : 3 + classes]
    allowed = torch.rand(classes, generator=generator) < 0.7
    for count in {1, min(9, classes), min(classes, 100)}:
        check(logits, None, count)
        check(logits, allowed, count)


def test_few_that_are_allowed_come_first() -> None:
    logits = torch.randn(2, 8200)
    allowed = torch.zeros(8200, dtype=torch.bool)
    allowed[[5, 8195]] = True
    log_p, ids = likeliest(logits, allowed, 4)
    expected, classes = formula(logits, allowed, 2)
    assert torch.equal(ids[:, :2], classes)
    torch.testing.assert_close(log_p[:, :2].double(), expected, rtol=2e-6, atol=2e-6)
    assert ids[:, 2:].tolist() == [[0, 1]] * 2
    assert log_p[:, 2:].eq(-INF).all()


def test_of_equals_the_lower_class_comes_first() -> None:
    logits = torch.zeros(1, 20_000)
    logits[0, [19_999, 8_192, 8_191, 77]] = 2.0
    _, ids = likeliest(logits, None, 6)
    assert ids.tolist() == [[77, 8_191, 8_192, 19_999, 0, 1]]


@pytest.mark.parametrize("size", [-300.0, 0.0, 300.0, 3e38])
def test_sizes_of_logits(size: float) -> None:
    logits = torch.full((1, 9000), size)
    log_p, ids = likeliest(logits, None, 3)
    assert ids.tolist() == [[0, 1, 2]]
    assert log_p[0].tolist() == pytest.approx([-math.log(9000)] * 3, abs=2e-6)


def test_classes_that_are_impossible_take_nothing() -> None:
    logits = torch.full((1, 20_000), -INF)
    logits[0, 12_345], logits[0, 3] = 1.0, 0.0
    log_p, ids = likeliest(logits, None, 3)
    assert ids[0, :2].tolist() == [12_345, 3]
    total = math.log(math.e + 1)
    assert log_p[0].tolist() == pytest.approx([1 - total, -total, -INF], abs=1e-6)


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("place", [0, 70, 8_191, 8_192, 8_199])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_not_finite_is_seen_in_its_row_alone(dtype: str, place: int, poison: float) -> None:
    logits = torch.randn(3, 8200).to(DTYPES[dtype])
    clean, _ = likeliest(logits, None, 4)
    logits[1, place] = poison
    allowed = torch.ones(8200, dtype=torch.bool)
    allowed[place] = False
    log_p, _ = likeliest(logits, allowed, 4)
    assert not log_p[1].isfinite().any()
    others = torch.tensor([0, 2])
    assert torch.isfinite(log_p[others]).all()
    assert torch.equal(likeliest(logits, None, 4)[0][others], clean[others])


def test_a_part_of_nothing_but_nan_is_seen() -> None:
    logits = torch.randn(1, 8193)
    logits[0, 8192] = NAN
    log_p, _ = likeliest(logits, torch.arange(8193) < 8192, 3)
    assert log_p.isnan().all()


def test_threads_change_no_bit() -> None:
    logits = torch.randn(5, 64_010)
    whole = likeliest(logits, None, 9)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for found, expected in zip(likeliest(logits, None, 9), whole, strict=True):
            assert torch.equal(found, expected)


def test_no_rows() -> None:
    log_p, ids = likeliest(torch.empty(0, 40), None, 3)
    assert (log_p.shape, ids.shape) == ((0, 3), (0, 3))


REFUSED: list[tuple[tuple[Any, ...], str]] = [
    ((torch.randn(40), None, 3), "logits must have 2 dimensions"),
    ((torch.randn(2, 40).double(), None, 3), "logits must be float32 or bfloat16"),
    ((torch.randn(40, 2).T, None, 3), "stride 1 in its last dimension"),
    ((torch.randn(2, 40), None, 0), "count must be from 1 to the 40 classes, got 0"),
    ((torch.randn(2, 40), None, 41), "got 41"),
    ((torch.randn(2, 40), torch.ones(40), 3), "allowed must be a contiguous bool"),
    ((torch.randn(2, 40), torch.ones(39, dtype=torch.bool), 3), r"\[40\], got shape \[39\]"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        likeliest(*arguments)


def test_the_op_takes_it() -> None:
    """Of equals the lower class, which torch.topk does not promise."""
    need("cpu")
    x, weight = torch.randn(4, 32).bfloat16(), torch.randn(64_010, 32).bfloat16()
    weight[40_000:] = weight[:24_010]
    _, ids = head_top_k(x, weight, None, 9, impl="cpu")
    assert ids.lt(40_000).any()
    for row in ids.tolist():
        pairs = [(own, own + 40_000) for own in row if own < 24_010]
        assert all(row.index(low) < row.index(high) for low, high in pairs if high in row)
    allowed = torch.arange(2 * 64_010)[::2] % 3 > 0
    assert allowed[head_top_k(x, weight, None, 9, allowed=allowed, impl="cpu")[1]].all()
    with pytest.raises(Beit3FastError, match="count must be"):
        head_top_k(x, weight, None, 0, impl="cpu")
