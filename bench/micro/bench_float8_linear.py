"""float8_linear alone: python -m pytest bench/micro/bench_float8_linear.py

fc1 of base, with LayerNorm, bias and GELU, its weights and rows in 8 bits, beside the same in bf16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beit3_fast.ops import Norm, expert_linear
from beit3_fast.ops.packed_weight import quantize_float8

from .conftest import Timed

ROWS, WIDTH, OUT = 788, 768, 3072


@pytest.mark.parametrize("operands", ["float8", "bf16"])
def test_float8_linear(timed: Timed, operands: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, generator=draw).bfloat16()
    plain = (torch.randn(OUT, WIDTH, generator=draw) * 0.03).bfloat16()
    weight = quantize_float8(plain) if operands == "float8" else plain
    norm = Norm([torch.ones(WIDTH).bfloat16()], [torch.zeros(WIDTH).bfloat16()])
    bias = torch.zeros(OUT).bfloat16()

    def call() -> Tensor:
        return expert_linear(x, [weight], [bias], bounds=(0, ROWS), norm=norm, activation="gelu")

    timed("float8_linear fc1", 2.0 * ROWS * WIDTH * OUT, call)
