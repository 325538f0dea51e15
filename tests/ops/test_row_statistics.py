"""Means and variances of rows on CPU: how exact they are, and that those which kernels leave are those of the rows.

test_cpu_kernels.py runs these at every level below this CPU's own as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import DTYPES, OPS
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.ops import Norm, expert_linear, shared_attention
from beit3_fast.ops.packed_weight import pack, quantize
from beit3_fast.ops.rows import ExpertNorm, expert_layer_norm
from beit3_fast.ops.whole_layer import LayerOperands, encoder_layers

EPS = 1e-5
HIDDEN = 416
HARD_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "a mean of 100 deviations": lambda x: x + 100,
    "a mean of 10,000 deviations": lambda x: x + 1e4,
    "a first number of 300": lambda x: torch.cat([x[:, :1] + 300, x[:, 1:]], 1),
    "sixteen first numbers of 300": lambda x: torch.cat([x[:, :16] + 300, x[:, 16:]], 1),
    "a last number of 10,000": lambda x: torch.cat([x[:, :-1], x[:, -1:] + 1e4], 1),
    "small": lambda x: x * 1e-3,
    "large": lambda x: x * 1e15,
    "squares beyond fp32, not so the deviations": lambda x: 1e18 * (1 + 0.01 * x),
}


@pytest.mark.parametrize("width", [1, 7, 16, 17, 32, 50, 64, 768, 3072])
@pytest.mark.parametrize("rows", HARD_ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_normalised_as_exactly_as_by_pytorch(dtype: str, rows: str, width: int) -> None:
    x = HARD_ROWS[rows](torch.randn(9, width)).to(DTYPES[dtype])
    one, zero = torch.ones(width, dtype=x.dtype), torch.zeros(width, dtype=x.dtype)
    truth = F.layer_norm(x.double(), (width,), eps=EPS)
    y = OPS.expert_layer_norm(x, [one], [zero], [EPS], [0, len(x)]).double()
    theirs = F.layer_norm(x, (width,), one, zero, EPS).double()
    rounding = torch.finfo(x.dtype).eps * truth.abs().amax()
    assert (y - truth).abs().amax() <= 2 * (theirs - truth).abs().amax() + rounding


class Layers(NamedTuple):
    """Random layers with two experts, and rows for them."""

    operands: list[LayerOperands]
    last: ExpertNorm
    x: Tensor
    layout: TokenLayout

    @classmethod
    def random(
        cls, form: str, width: int, heads: int, vision: list[int], text: list[int]
    ) -> Layers:
        dtype = torch.float32 if "fp32" in form else torch.bfloat16
        store = partial(quantize, dtype=dtype) if "int8" in form else pack
        layout = TokenLayout.from_lengths(vision, text)
        bounds = (0, sum(vision), layout.num_rows)

        def layer() -> LayerOperands:
            shapes = [(width, width)] * 8 + [(HIDDEN, width)] * 2 + [(width, HIDDEN)] * 2
            weights = [store((0.1 * torch.randn(s)).to(dtype)) for s in shapes]
            biases = [torch.randn(s[0]).to(dtype) for s in shapes]
            widths = [width] * 6 + [HIDDEN] * 2
            norm_weights, norm_biases = (
                [torch.randn(w).to(dtype) for w in widths] for _ in range(2)
            )
            eps = [1e-5, 0.1, 0.2, 0.3]
            own = weights, biases, norm_weights, norm_biases, eps
            return LayerOperands(*own, bounds, bounds, bounds, heads)

        x = torch.randn(layout.num_rows, width)
        x[::3] += 100  # sums of pairs are too inexact for these
        x[1::5, 0] -= 300
        weight, bias = (torch.randn(width).to(dtype) for _ in range(2))
        last = ExpertNorm([weight], [bias], [1e-5], [0, len(x)])
        return cls([layer() for _ in range(3)], last, x.to(dtype), layout)

    def at_once(self) -> Tensor:
        y = encoder_layers(self.x, self.operands, self.layout, last=self.last, impl="cpu")
        assert y is not None
        return y

    def one_by_one(self, mask: str = "bidirectional") -> Tensor:
        """Each op measures the rows that it reads."""
        x, heads = self.x, self.operands[0].num_heads
        for own in self.operands:
            projected = product(own, x, 0, 3)
            q, k, v = projected.chunk(3, 1)
            o = shared_attention(q, k, v, self.layout, num_heads=heads, mask=mask, impl="cpu")
            a = product(own, o, 6, residual=x)
            h = product(own, a, 8, activation="gelu")
            x = product(own, h, 10, residual=a)
        return expert_layer_norm(x, self.last, impl="cpu")


def product(
    own: LayerOperands,
    x: Tensor,
    first: int,
    parts: int = 1,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A product of a layer, whose weights come from the ``first`` on, ``parts`` of each of its two experts."""
    weights, biases = (
        [tuple(of[first + e * parts : first + (e + 1) * parts]) for e in range(2)]
        for of in (own.weights, own.biases)
    )
    index = max(first // 2 - 2, 0)
    norm = slice(2 * index, 2 * index + 2)
    return expert_linear(
        x,
        weights,
        biases,
        bounds=list(own.bounds),
        norm=Norm(own.norm_weights[norm], own.norm_biases[norm], own.eps[index]),
        activation=activation,
        residual=residual,
        impl="cpu",
    )


SAMPLES = {
    "few rows": ([5, 4], [3, 2]),
    "samples alike": ([70] * 4, [12] * 4),
    "samples that share unevenly": ([300, 40], [0, 30]),
    "texts of any length": ([0] * 5, [150, 1, 0, 130, 20]),
}


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("head", [64, 88])
@pytest.mark.parametrize("form", ["fp32", "bf16", "int8, bf16", "int8, fp32"])
def test_layers_at_once_are_those_one_by_one(form: str, head: int, samples: str) -> None:
    torch.set_num_threads(2)
    case = Layers.random(form, 4 * head, 4, *SAMPLES[samples])
    assert torch.equal(case.at_once(), case.one_by_one())
