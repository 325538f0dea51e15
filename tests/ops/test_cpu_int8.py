"""int8 weights in the compiled CPU ops, at every instruction-set level of this machine.

The formula: weight rows and activation rows are rounded to 8 bits, each by its largest magnitude / 127, and their
products are exact. Without LayerNorm the rounding is that of the kernel, number for number.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import DTYPES, EPS, OPS, Linear, randn
from test_cpu_kernels import LEVELS, SHAPES, Fence
from torch import Tensor

from beit3_fast.ops import library
from beit3_fast.parity import op_parity

LEVEL = library.cpu_isa()


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of a matrix and their scales [rows, 1], with the kernel's own fp32 arithmetic."""
    x = x.float()
    largest = x.abs().amax(1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0)
    return (x * inverse).round().double(), (largest / 127).double()


def product(x: Tensor, weight: Tensor) -> Tensor:
    (a, row_scale), (b, column_scale) = rounded(x), rounded(weight)
    return (a @ b.T) * row_scale * column_scale.T


class Int8Linear(Linear):
    """``Linear`` with its weights rounded to int8."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.packed = [OPS.quantize_weight(w) for w in self.weights]

    def formula(self, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(len(self.x), len(self.weights[0]), dtype=dtype)
        rows = torch.arange(len(self.x)) if self.rows is None else self.rows
        for e, weight in enumerate(self.weights):
            r = rows[self.bounds[e] : self.bounds[e + 1]]
            y = self.x[r]
            if self.norm:
                y = F.layer_norm(
                    y.double(), y.shape[1:], self.norm[e].double(), self.shift[e].double(), EPS
                )
            y = product(y, weight).to(dtype) + self.biases[e].to(dtype)
            if self.activation == "gelu":
                y = F.gelu(y)
            out[r] = y if self.residual is None else y + self.residual[r].to(dtype)
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_sizes(shape: tuple[int, int, int], dtype: str) -> None:
    for case in range(8):
        gelu, residual, gather = (bool(case >> bit & 1) for bit in range(3))
        Int8Linear(
            DTYPES[dtype],
            shape,
            experts=1 + case % 3,
            norm=False,
            activation="gelu" if gelu else "none",
            residual=residual,
            gather=gather,
            seed=case,
        ).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["normal", "mean", "outlier", "spike"])
def test_layer_norm_in_front(values: str, dtype: str) -> None:
    """LayerNorm in another order may move single numbers from one whole number to the next, no more."""
    for shape in [(9, 768, 40), (30, 65, 70), (40, 200, 33)]:
        case = Int8Linear(DTYPES[dtype], shape, experts=2, values=values)
        found, expected = case.run().double(), case.formula(torch.float64)
        plain = Linear(DTYPES[dtype], shape, experts=2, values=values)
        exact = plain.formula(torch.float64)
        scale = exact.norm()
        assert (found - expected).norm() <= (5e-3 if dtype == "bf16" else 1e-3) * scale
        # Two rounded factors, each with an error of a quarter to a half of a percent; a channel that towers
        # over the others leaves the others of its row fewer than 8 bits.
        assert (found - exact).norm() <= (0.02 if values in ("normal", "mean") else 0.1) * scale


def test_long_rows_stay_exact() -> None:
    """As many products as there may be of the largest numbers, all of one sign, over many blocks of depth."""
    x, weight = torch.full((33, 131_072), 3.0), torch.full((35, 131_072), -2.0)
    weight[1::2] *= -1
    packed = OPS.quantize_weight(weight)
    found = OPS.expert_linear(x, [weight], [packed], [], [], [], None, None, [0, 33], EPS, "none")
    assert op_parity(found, x @ weight.T, x.double() @ weight.double().T).passed


def test_rounding_is_per_row_and_per_channel() -> None:
    """A row and a channel a million times larger than the others leave these as exact as they are alone."""
    g = torch.Generator().manual_seed(0)
    x, weight = randn(40, 96, generator=g), randn(64, 96, generator=g)
    x[7] *= 1e6
    weight[11] *= 1e6
    packed = OPS.quantize_weight(weight)
    found = OPS.expert_linear(x, [weight], [packed], [], [], [], None, None, [0, 40], EPS, "none")
    expected = x.double() @ weight.double().T
    rows, channels = torch.arange(40) != 7, torch.arange(64) != 11
    small = (found - expected)[rows][:, channels].norm() / expected[rows][:, channels].norm()
    assert small < 0.015


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_not_hidden(bad: float) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = randn(30, 70, generator=g), randn(40, 70, generator=g)
    for tensor, row in ((x, 3), (weight, 5)):
        tensor[row, 69] = bad
    packed = OPS.quantize_weight(weight)
    found = OPS.expert_linear(x, [weight], [packed], [], [], [], None, None, [0, 30], EPS, "none")
    expected = torch.zeros(30, 40, dtype=torch.bool)
    expected[3], expected[:, 5] = True, True
    assert torch.equal(found.isnan(), expected)


def test_zero_rows_and_channels() -> None:
    """And a row of numbers so small that 127 divided by them overflows."""
    x, weight = torch.zeros(5, 70), torch.zeros(33, 70)
    x[1], weight[2], x[4] = 1.0, 0.5, 1e-38
    packed = OPS.quantize_weight(weight)
    found = OPS.expert_linear(x, [weight], [packed], [], [], [], None, None, [0, 5], EPS, "none")
    assert torch.equal(found.nonzero(), torch.tensor([[1, 2]]))
    assert found[1, 2].item() == pytest.approx(35.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_does_not_depend_on_its_place(dtype: str) -> None:
    """Rows that are named are those that lie one behind the other, and channels of a narrow panel those of a whole one."""
    case = Int8Linear(DTYPES[dtype], (70, 64, 48))
    case.weights[0][32:] = case.weights[0][:16]
    case.biases[0][32:] = case.biases[0][:16]
    case.packed = [OPS.quantize_weight(w) for w in case.weights]
    y = case.run()
    assert torch.equal(case.run(rows=torch.arange(70)), y)
    assert torch.equal(y[:, 32:], y[:, :16])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked_weights(dtype: str) -> None:
    g = torch.Generator().manual_seed(0)
    for rows, columns in [(1, 1), (33, 65), (70, 200)]:
        weight = randn(rows, columns, generator=g).to(DTYPES[dtype])
        whole, scale = rounded(weight)
        unpacked = OPS.unpack_weight(OPS.quantize_weight(weight), rows, columns)
        assert unpacked.dtype is torch.float32
        torch.testing.assert_close(unpacked.double(), whole * scale, rtol=1e-6, atol=0)


def test_bad_operands_are_refused() -> None:
    x, weight = torch.randn(4, 32), torch.randn(40, 32)
    int8, plain = OPS.quantize_weight(weight), OPS.pack_weight(weight)
    bounds = [0, 2, 4]
    for packed in ([int8, plain], [plain, int8], [int8[:-1], int8]):
        with pytest.raises(RuntimeError, match="packed"):
            OPS.expert_linear(x, [weight] * 2, packed, [], [], [], None, None, bounds, EPS, "none")
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        OPS.quantize_weight(weight.double())
    with pytest.raises(RuntimeError, match="must not be empty"):
        OPS.quantize_weight(weight[:0])
    with pytest.raises(RuntimeError, match="sums of at most 131072 products, got 131073"):
        OPS.quantize_weight(torch.zeros(1, 131_073))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages without access")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_outside_its_tensor(dtype: str, at_end: bool) -> None:
    fence = Fence(at_end)
    for shape in [(5, 33, 17), (13, 40, 100), (3, 7, 33), (26, 64, 64), (2, 1093, 45)]:
        case = Int8Linear(DTYPES[dtype], shape, activation="gelu", residual=True)
        wanted = case.run()
        for name in ("packed", "biases", "norm", "shift"):
            setattr(case, name, [fence(t) for t in getattr(case, name)])
        assert case.residual is not None
        case.x, case.residual = fence(case.x), fence(case.residual)
        assert torch.equal(case.run(), wanted)
        OPS.quantize_weight(fence(case.weights[0]))
    fence.open()


@pytest.mark.skipif("BEIT3_FAST_CPU_ISA" in os.environ, reason="runs at one level")
@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(LEVEL)])
def test_lower_levels(level: str) -> None:
    environment = {**os.environ, "BEIT3_FAST_CPU_ISA": level}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
