"""The calls of the self-check leave no CUDA kernel for compute capability 9.0 out, on the 132 multiprocessors of an H100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated_linear import Plan, plan

from beit3_fast.ops import cuda_kernels, kernel_cases

LOW, HIGH = Plan(bands=1), Plan(bands=2)
PLANS = (LOW, Plan(1, shares=2), Plan(1, shares=4), HIGH, Plan(2, high=2))
# Keys that a kernel has at once or, of one that takes 128 a step, in the last.
WHOLE, LAST = (64, 128, 200, 256), {64: (32, 80, 128), 88: (128,)}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[tuple[Any, ...]]]:
    """The arguments of every launch of a check, which launches nothing."""

    def run(check: str) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(
            cuda_kernels, "launch", lambda kernel, *own: calls.append((kernel, *own))
        )
        kernel_cases.CUDA_CASES[check](torch.float16, "cpu")
        return calls

    return run


def test_every_plan_of_a_product_is_met(launched: Any) -> None:
    met = set()
    for kernel, *call in launched("cuda_expert_linear"):
        if kernel == "expert_linear":
            (out, inner), rows, bounds = call[1].shape[1:], call[8], call[9]
            met.add((plan(bounds, inner, out, gathered=rows is not None), rows is not None))
    assert met == {(own, named) for own in PLANS for named in (False, True)} | {
        (Plan(2, high=2, wide=2), False)
    }


def test_every_number_of_keys_is_met(launched: Any) -> None:
    met = set()
    for call in launched("cuda_shared_attention"):
        longest, width = call[9], call[1].shape[1] // call[11]
        if longest <= WHOLE[-1]:
            met.add((width, "whole", min(keys for keys in WHOLE if keys >= longest)))
        else:
            lengths = (call[4].diff() + call[5].diff()).tolist()
            # The last of several steps: the only one of a sample is another loop.
            for last in [(keys - 1) % 128 + 1 for keys in lengths if keys > 128]:
                met.add((width, "last", min(most for most in LAST[width] if most >= last)))
    assert met == {(width, "whole", keys) for width in LAST for keys in WHOLE} | {
        (width, "last", keys) for width in LAST for keys in LAST[width]
    }
