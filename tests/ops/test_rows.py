"""The last LayerNorm and the way back to padded rows: every implementation against the formula, by the one parity rule."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, IMPLS, TARGETS, assert_near, lay, need, values
from torch import Tensor

from beit3_fast.ops import ExpertNorm, expert_layer_norm, library, unpack_rows
from beit3_fast.parity import op_parity

BOUNDS = {  # of rows and columns
    "one expert": ((0, 9), 96),
    "two": ((0, 70, 83), 64),
    "odd": ((0, 1, 1, 67, 130), 35),
    "one column": ((0, 4, 7), 1),
    "no rows of any": ((0, 0, 0), 16),
    "memory of earlier results": ((0, 700, 1500), 416),
}


def norm_of(bounds: tuple[int, ...], width: int, dtype: torch.dtype) -> ExpertNorm:
    draw = torch.Generator().manual_seed(1)
    experts = range(len(bounds) - 1)
    weights, biases = (
        [torch.randn(width, generator=draw).to(dtype) for _ in experts] for _ in range(2)
    )
    return ExpertNorm(weights, biases, [1e-5 * 10**e for e in experts], bounds)


def plain(x: Tensor, norm: ExpertNorm) -> Tensor:
    """The same by PyTorch's LayerNorm, in the dtype of x."""
    each = zip(norm.weights, norm.biases, norm.eps, pairwise(norm.bounds), strict=True)
    return torch.cat(
        [
            F.layer_norm(x[begin:end], x.shape[1:], w.to(x.dtype), b.to(x.dtype), eps)
            for w, b, eps, (begin, end) in each
        ]
    )


def rows_of(case: str, dtype: torch.dtype, kind: str = "normal") -> Tensor:
    bounds, width = BOUNDS[case]
    return values(kind, bounds[-1], width, torch.Generator().manual_seed(0)).to(dtype)


def check(x: Tensor, norm: ExpertNorm, impl: str) -> Tensor:
    need(impl)
    y = expert_layer_norm(x, norm, impl=impl)
    assert y.dtype == x.dtype
    if len(x):
        assert_near(op_parity(y, plain(x, norm), plain(x.double(), norm)), impl)
    return y


@pytest.mark.parametrize(("impl", "dtype"), TARGETS)
@pytest.mark.parametrize("case", BOUNDS)
def test_sizes(case: str, impl: str, dtype: str) -> None:
    check(rows_of(case, DTYPES[dtype]), norm_of(*BOUNDS[case], DTYPES[dtype]), impl)


@pytest.mark.parametrize(("impl", "dtype"), TARGETS)
@pytest.mark.parametrize("kind", ["mean", "outliers", "constant", "small"])
def test_values(kind: str, impl: str, dtype: str) -> None:
    x = rows_of("two", DTYPES[dtype], kind)
    check(x, norm_of(*BOUNDS["two"], DTYPES[dtype]), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["sliced", "every second row", "transposed"])
def test_memory_of_the_rows_does_not_matter(layout: str, impl: str) -> None:
    need(impl)
    x, norm = rows_of("two", torch.float32), norm_of(*BOUNDS["two"], torch.float32)
    wanted = expert_layer_norm(x, norm, impl=impl)
    assert torch.equal(expert_layer_norm(lay(x, layout), norm, impl=impl), wanted)


def test_results_in_used_memory_do_not_depend_on_what_it_held() -> None:
    need("cpu")
    case = "memory of earlier results"
    x, norm = rows_of(case, torch.float32), norm_of(*BOUNDS[case], torch.float32)
    wanted = check(x, norm, "cpu").clone()
    places = torch.arange(0, 3000, 2)
    unpacked = unpack_rows(x, places, 3000).clone()
    for spoilt in (torch.nan, torch.inf):
        for make in (
            lambda: expert_layer_norm(x, norm, impl="cpu"),
            lambda: unpack_rows(x, places, 3000),
        ):
            make().fill_(spoilt)
        assert torch.equal(expert_layer_norm(x, norm, impl="cpu"), wanted)
        assert torch.equal(unpack_rows(x, places, 3000), unpacked)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(threads: int) -> None:
    need("cpu")
    case = "memory of earlier results"
    x, norm = rows_of(case, torch.bfloat16), norm_of(*BOUNDS[case], torch.bfloat16)
    torch.set_num_threads(1)
    wanted = expert_layer_norm(x, norm, impl="cpu")
    torch.set_num_threads(threads)
    assert torch.equal(expert_layer_norm(x, norm, impl="cpu"), wanted)


def test_rows_of_zero_norm_and_poison_stay_alone() -> None:
    need("cpu")
    x, norm = rows_of("two", torch.float32), norm_of(*BOUNDS["two"], torch.float32)
    wanted = expert_layer_norm(x, norm, impl="cpu")
    x[3], x[71] = torch.nan, 0.0
    y = expert_layer_norm(x, norm, impl="cpu")
    others = [r for r in range(len(x)) if r not in (3, 71)]
    assert torch.equal(y[others], wanted[others])
    assert y[3].isnan().all()
    assert torch.equal(y[71], norm.biases[1])


def test_gradients() -> None:
    bounds = (0, 4, 9)
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    leaves = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(4)]

    def run(x: Tensor, *own: Tensor) -> Tensor:
        return expert_layer_norm(x, ExpertNorm(own[:2], own[2:], [1e-5, 1e-2], bounds))

    assert torch.autograd.gradcheck(run, (x, *leaves))
    x32 = torch.randn(9, 6, requires_grad=True)
    y = expert_layer_norm(x32, norm_of(bounds, 6, torch.float32))
    assert y.requires_grad


def test_a_norm_without_bias_is_pytorchs() -> None:
    x, norm = rows_of("two", torch.float32), norm_of(*BOUNDS["two"], torch.float32)
    without: Any = norm._replace(biases=[norm.biases[0], None])
    y = expert_layer_norm(x, without)
    assert torch.equal(y[70:], F.layer_norm(x[70:], (64,), norm.weights[1], None, norm.eps[1]))
    assert torch.equal(y[:70], F.layer_norm(x[:70], (64,), norm.weights[0], norm.biases[0], 1e-5))


def test_under_autocast_it_is_pytorchs() -> None:
    x, norm = rows_of("two", torch.bfloat16), norm_of(*BOUNDS["two"], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        each = zip(norm.weights, norm.biases, norm.eps, pairwise(norm.bounds), strict=True)
        wanted = torch.cat([F.layer_norm(x[b:e], (64,), w, v, o) for w, v, o, (b, e) in each])
        y = expert_layer_norm(x, norm)
    assert y.dtype == wanted.dtype
    assert torch.equal(y, wanted)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
)
@pytest.mark.parametrize(("rows", "count"), [(0, 5), (7, 7), (40, 150), (1200, 1500)])
def test_unpacked_rows(rows: int, count: int, dtype: torch.dtype) -> None:
    x = (100 * torch.randn(rows, 400)).to(dtype)
    places = torch.randperm(count)[:rows]
    wanted = x.new_zeros(count, 400).index_copy(0, places, x)
    assert torch.equal(unpack_rows(x, places, count), wanted)
    assert torch.equal(unpack_rows(lay(x, "transposed"), places, count), wanted)


def test_unpacked_rows_have_gradients() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([5, 0, 2, 3])
    assert torch.autograd.gradcheck(lambda x: unpack_rows(x, places, 7), (x,))
    assert torch.func.jvp(lambda x: unpack_rows(x, places, 7), (x,), (x,))[1].shape == (7, 3)


NORM: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"x": torch.randn(5, 8).half()}, "float32 or bfloat16"),
    "vector": ({"x": torch.randn(8)}, "2 dimensions"),
    "no columns": ({"x": torch.randn(5, 0)}, "must have columns"),
    "one bias": ({"biases": [torch.randn(8)]}, "for each expert"),
    "no expert": ({"weights": [], "biases": [], "eps": []}, "for each expert"),
    "eps": ({"eps": [1e-5, -1.0]}, "eps must be finite and not negative"),
    "three bounds": ({"bounds": [0, 2, 3, 5]}, "3 entries"),
    "bounds fall": ({"bounds": [0, 6, 5]}, "not decrease"),
    "bounds end": ({"bounds": [0, 2, 6]}, "end at 6 but there are 5"),
    "width": ({"weights": [torch.randn(8), torch.randn(7)]}, r"weights\[1\]"),
    "a slanted bias": ({"biases": [torch.randn(8), torch.randn(8, 2)[:, 0]]}, r"biases\[1\]"),
}
UNPACK: dict[str, tuple[dict[str, Any], str]] = {
    "vector": ({"x": torch.randn(8)}, "2 dimensions"),
    "columns apart": ({"x": torch.randn(8, 3).T}, "stride 1"),
    "a place more": ({"places": torch.arange(4)}, r"int64 CPU tensor \[3\]"),
    "int32 places": ({"places": torch.arange(3).int()}, "int64"),
    "a place too far": ({"places": torch.tensor([0, 5, 1])}, r"places\[1\] is 5"),
    "a place below": ({"places": torch.tensor([0, 1, -1])}, r"places\[2\] is -1"),
    "count": ({"count": -1}, "not be negative"),
}


@pytest.mark.parametrize("name", NORM)
def test_a_norm_that_does_not_fit(name: str) -> None:
    need("cpu")
    library.load()
    changes, message = NORM[name]
    own: dict[str, Any] = {
        "x": torch.randn(5, 8),
        "weights": [torch.randn(8)] * 2,
        "biases": [torch.randn(8)] * 2,
        "eps": [1e-5, 1e-6],
        "bounds": [0, 2, 5],
    }
    torch.ops.beit3_fast.expert_layer_norm(**own)
    with pytest.raises(RuntimeError, match=f"expert_layer_norm: .*{message}"):
        torch.ops.beit3_fast.expert_layer_norm(**(own | changes))


@pytest.mark.parametrize("name", UNPACK)
def test_places_that_do_not_fit(name: str) -> None:
    need("cpu")
    library.load()
    changes, message = UNPACK[name]
    own: dict[str, Any] = {"x": torch.randn(3, 8), "places": torch.arange(3), "count": 5}
    torch.ops.beit3_fast.unpack_rows(**own)
    with pytest.raises(RuntimeError, match=f"unpack_rows: .*{message}"):
        torch.ops.beit3_fast.unpack_rows(**(own | changes))
