from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_fast.errors import KernelUnavailable

Timed = Callable[[str, float, Callable[[], Tensor]], None]


@pytest.fixture
def timed(benchmark: Any) -> Timed:
    """``timed(group, flops, call)``: times a call in inference mode, or skips it with the reason.

    Members of a group share a table. Saved results (--benchmark-json) hold the rate in TFLOP/s, too.
    """

    def run(group: str, flops: float, call: Callable[[], Tensor]) -> None:
        benchmark.group = group
        with torch.inference_mode():
            try:
                call()
            except KernelUnavailable as reason:
                pytest.skip(str(reason))
            benchmark(call)
        if benchmark.stats is not None:
            benchmark.extra_info["tflops"] = round(flops / benchmark.stats["median"] / 1e12, 3)

    return run
