"""head_top_k: every implementation against the formula in fp64, and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_cases import DTYPES, TARGETS, assert_near, need, plain_best
from torch import Tensor

from beit3_fast.errors import Beit3FastError
from beit3_fast.ops import dispatch, head_top_k
from beit3_fast.parity import op_parity
from beit3_fast.reference.head_top_k import head_top_k as formula

ROWS, WIDTH, CLASSES = 6, 40, 301


def operands(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(CLASSES, WIDTH, generator=generator)
    return [t.to(dtype) for t in (x, weight, torch.randn(CLASSES, generator=generator))]


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize(("impl", "dtype"), [*TARGETS, ("auto", "fp32"), ("auto", "bf16")])
def test_against_the_formula(impl: str, dtype: str, count: int, restricted: bool) -> None:
    need(impl)
    x, weight, bias = operands(DTYPES[dtype])
    allowed = torch.arange(CLASSES) % 3 > 0 if restricted else None
    exact = (x.double(), weight.double(), bias.double())
    every, order = formula(*exact, allowed, CLASSES)
    log_p, ids = head_top_k(x, weight, bias, count, allowed=allowed, impl=impl)
    assert log_p.dtype == torch.float32
    taken = dispatch.choose(dispatch.situation("head_top_k", [x, weight, bias]), impl).impl
    plain, others = plain_best(x, weight, bias, count, allowed, taken != "composite")
    assert_near(op_parity(log_p, plain, every[:, :count]), (impl, dtype))
    by_class = torch.empty_like(every).scatter(1, order, every)
    found = by_class.gather(1, ids).float()
    assert_near(
        op_parity(found, by_class.gather(1, others).float(), every[:, :count]), (impl, dtype)
    )
    assert all(len(set(row)) == count for row in ids.tolist())
    assert allowed is None or bool(allowed[ids].all())


def test_the_formula_itself() -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    bias = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)
    total = math.log(math.exp(1.5) + 2 * math.exp(2.0))
    log_p, ids = formula(x, weight, bias, None, 3)
    assert ids.tolist() == [[1, 2, 0]], "equals in ascending order"
    assert log_p[0].tolist() == pytest.approx([2.0 - total, 2.0 - total, 1.5 - total])
    log_p, ids = formula(x, weight, None, torch.tensor([True, False, True]), 1)
    assert ids.tolist() == [[2]]
    assert log_p.item() == pytest.approx(2.0 - math.log(math.exp(1.0) + 2 * math.exp(2.0)))


def test_of_equals_the_first_is_the_likeliest() -> None:
    x, weight, bias = operands(torch.float32)
    weight[200:] = weight[100]
    bias[:], bias[100], bias[200:] = -100.0, 0.0, 0.0
    for impl in ("reference", "composite"):
        _, ids = head_top_k(x, weight, bias, 1, impl=impl)
        assert ids.eq(100).all(), impl


x, weight, bias = operands(torch.float32)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"x": None}, "x must be a tensor, got NoneType"),
    ({"x": x[0]}, r"x must be a floating-point tensor \[R, D\].*shape \[40\]"),
    ({"x": x.long()}, "floating-point.*got torch.int64"),
    ({"weight": weight[:, :8]}, r"weight must have shape \[V, D\] with D = 40, got \[301, 8\]"),
    ({"weight": weight.bfloat16()}, "weight must have x's dtype torch.float32, got torch.bfloat16"),
    ({"weight": weight.to("meta")}, "weight must be on x's device cpu, got meta"),
    ({"bias": bias[:5]}, r"bias must have shape \[V\] = \[301\], got \[5\]"),
    ({"bias": bias.half()}, "bias must have x's dtype"),
    ({"allowed": bias}, r"allowed must be bool \[V\] = \[301\], got torch.float32"),
    ({"allowed": bias[:5] > 0}, r"of shape \[5\]"),
    ({"count": 0}, "count must be from 1 to the number of classes, 301, got 0"),
    ({"count": 302}, "got 302"),
    ({"count": 2.0}, "got 2.0"),
    ({"impl": "fast"}, "impl must be 'auto' or one of.*'fast'"),
    ({"impl": "triton"}, "head_top_k: impl='triton' was asked for, but it has no kernel"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_fit_is_said(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, "count": 3}
    with pytest.raises(Beit3FastError, match=message):
        head_top_k(**(arguments | changes))
