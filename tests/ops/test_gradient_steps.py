"""What the gradients of expert_linear are made of besides products: transposing, and the gradients of LayerNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cpu_cases import DTYPES, OPS, hard_values
from op_cases import assert_near, lay
from torch import Tensor

from beit3_fast.ops import library
from beit3_fast.parity import op_parity

SHAPES = [(1, 1), (1, 40), (7, 3), (31, 33), (32, 32), (64, 31), (65, 64), (133, 88), (197, 770)]
NORMS = [(1, 3), (9, 16), (64, 35), (65, 17), (200, 88), (5000, 24), (3, 3072)]


@pytest.fixture(autouse=True)
def _loaded() -> None:
    library.load()


def operands(
    rows: int, width: int, dtype: torch.dtype, kind: str = "normal"
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the result, with a mean, as sums of it have something to lose; the rows; the weight."""
    draw = torch.Generator().manual_seed(rows + width)
    x = hard_values(kind, rows, width, draw)
    grad = torch.randn(rows, width, generator=draw) + 0.5
    return grad.to(dtype), x.to(dtype), (1 + 0.3 * torch.randn(width, generator=draw)).to(dtype)


def by_pytorch(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    bias = torch.zeros_like(weight, requires_grad=True)
    F.layer_norm(x, weight.shape, weight, bias, eps).backward(grad)
    return [t.grad for t in (x, weight, bias) if t.grad is not None]


def check_gradients(grad: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5) -> None:
    found = OPS.layer_norm_gradients(grad, x, weight, eps)
    truth = by_pytorch(grad.double(), x.double(), weight.double(), eps)
    plain = by_pytorch(grad, x, weight, eps)
    if x.dtype is torch.bfloat16:  # whose sums over rows stand still (composite/_layer_norm.py)
        plain[1:] = [
            t.to(x.dtype) for t in by_pytorch(grad.float(), x.float(), weight.float(), eps)[1:]
        ]
    names = ("x", "weight", "bias")
    for name, ours, theirs, expected in zip(names, found, plain, truth, strict=True):
        assert ours.dtype == x.dtype
        assert_near(op_parity(ours, theirs, expected, gradient=True), f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_layer_norm(shape: tuple[int, int], dtype: str) -> None:
    check_gradients(*operands(*shape, DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mean", "outlier", "spike"])
def test_layer_norm_of_hard_rows(kind: str, dtype: str) -> None:
    check_gradients(*operands(70, 64, DTYPES[dtype], kind), eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_of_the_operands_does_not_matter(dtype: str) -> None:
    grad, x, weight = operands(70, 48, DTYPES[dtype])
    wanted = OPS.layer_norm_gradients(grad, x, weight, 1e-5)
    apart = [lay(t, layout) for t, layout in ((grad, "sliced"), (x, "every second row"))]
    for ours, expected in zip(OPS.layer_norm_gradients(*apart, weight, 1e-5), wanted, strict=True):
        assert torch.equal(ours, expected)
    for layout in ("sliced", "every second row"):
        assert torch.equal(OPS.transposed(lay(x, layout)), x.T)


def test_rows_in_bfloat16_with_a_weight_in_fp32() -> None:
    """The gradients of weight and bias come in the weight's dtype, and as near as it allows."""
    grad, x, weight = operands(300, 40, torch.bfloat16)
    found = OPS.layer_norm_gradients(grad, x, weight.float(), 1e-5)
    truth = by_pytorch(grad.double(), x.double(), weight.double(), 1e-5)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, expected in zip(found[1:], truth[1:], strict=True):
        assert float((ours - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(dtype: str) -> None:
    grad, x, weight = operands(1000, 96, DTYPES[dtype])
    torch.set_num_threads(1)
    wanted = [*OPS.layer_norm_gradients(grad, x, weight, 1e-5), OPS.transposed(x)]
    torch.set_num_threads(3)
    found = [*OPS.layer_norm_gradients(grad, x, weight, 1e-5), OPS.transposed(x)]
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_in_used_memory_do_not_depend_on_what_it_held(dtype: str) -> None:
    grad, x, weight = operands(1500, 416, DTYPES[dtype])
    wanted = [
        t.clone() for t in (*OPS.layer_norm_gradients(grad, x, weight, 1e-5), OPS.transposed(x))
    ]
    packed = OPS.pack_transposed(x).clone()
    for spoilt in (torch.nan, torch.inf):
        OPS.layer_norm_gradients(grad, x, weight, 1e-5)[0].fill_(spoilt)
        OPS.transposed(x).fill_(spoilt)
        OPS.pack_transposed(x).fill_(spoilt)
        found = [*OPS.layer_norm_gradients(grad, x, weight, 1e-5), OPS.transposed(x)]
        assert all(map(torch.equal, found, wanted))
        assert torch.equal(OPS.pack_transposed(x).view(torch.int16), packed.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_no_number_spoils_sums_and_no_other_row(dtype: str) -> None:
    grad, x, weight = operands(70, 48, DTYPES[dtype])
    wanted, *_ = OPS.layer_norm_gradients(grad, x, weight, 1e-5)
    x[3, 5] = torch.nan
    rows, *sums = OPS.layer_norm_gradients(grad, x, weight, 1e-5)
    others = [r for r in range(len(x)) if r != 3]
    assert torch.equal(rows[others], wanted[others])
    assert rows[3].isnan().all()
    assert sums[0].isnan().all()
    assert sums[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: str) -> None:
    grad, x, weight = operands(0, 20, DTYPES[dtype])
    rows, *sums = OPS.layer_norm_gradients(grad, x, weight, 1e-5)
    assert rows.shape == (0, 20)
    assert all(torch.equal(own, torch.zeros_like(weight)) for own in sums)
    assert OPS.transposed(x).shape == (20, 0)
    assert OPS.transposed(x[:, :0]).shape == (0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed(shape: tuple[int, int], dtype: str) -> None:
    """Bits stay what they are, those of no numbers too."""
    bits = torch.randint(-(2**15), 2**15, (*shape, 2), generator=torch.Generator().manual_seed(1))
    whole = bits.to(torch.int16).view(torch.int32)[..., 0]
    x = (
        whole.view(torch.float32)
        if dtype == "fp32"
        else bits[..., 0].to(torch.int16).view(torch.bfloat16)
    )
    integers = torch.int32 if dtype == "fp32" else torch.int16
    y = OPS.transposed(x)
    assert y.is_contiguous()
    assert torch.equal(y.view(integers), x.view(integers).T)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"x": torch.randn(5, 8).half()}, "float32 or bfloat16"),
    "vector": ({"x": torch.randn(8)}, "2 dimensions"),
    "no columns": ({"x": torch.randn(5, 0)}, "must have columns"),
    "another dtype": ({"grad": torch.randn(5, 8).bfloat16()}, "grad must be .* the same dtype"),
    "rows": ({"grad": torch.randn(4, 8)}, "grad must have the shape of x"),
    "columns apart": ({"grad": torch.randn(8, 5).T}, "grad must have stride 1"),
    "width": ({"weight": torch.randn(7)}, r"weight must be contiguous with shape \[8\]"),
    "eps": ({"eps": -1.0}, "eps must be finite and not negative"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_operands_that_do_not_fit(name: str) -> None:
    changes, message = MISFITS[name]
    own: dict[str, Any] = {"grad": torch.randn(5, 8), "x": torch.randn(5, 8)}
    own |= {"weight": torch.randn(8), "eps": 1e-5}
    OPS.layer_norm_gradients(**own)
    with pytest.raises(RuntimeError, match=f"layer_norm_gradients: .*{message}"):
        OPS.layer_norm_gradients(**(own | changes))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(5, 8).half(), "float32 or bfloat16"),
        (torch.randn(8), "2 dimensions"),
        (torch.randn(8, 5).T, "stride 1"),
    ],
    ids=["dtype", "vector", "columns apart"],
)
def test_what_cannot_be_transposed(x: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"transposed: x .*{message}"):
        OPS.transposed(x)
