"""More keys than stay near: they are met a range at a time, with a running maximum."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_cases import DTYPES, OPS, Attention, Cached, cumulative
from torch import Tensor

from beit3_fast.ops import library
from beit3_fast.parity import op_parity

AT_ONCE = {"fp32": 1024, "bf16": 2048}  # kKeysAtOnce


@pytest.fixture(autouse=True)
def _loaded() -> None:
    library.load()


def check(case: Attention, mask: str, seen: Tensor | None = None) -> Tensor:
    ours = case.run(mask, seen=seen)
    dtype = ours.dtype
    plain, truth = (case.formula(mask, t, seen) for t in (dtype, torch.float64))
    result = op_parity(ours, plain, truth)
    assert result.passed, result.reason
    return ours


def every_third(case: Attention) -> tuple[list[list[int]], list[list[int]]]:
    return [list(range(0, n, 3)) for n in case.vision], [list(range(1, n, 3)) for n in case.text]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["bidirectional", "seq2seq", "causal"])
@pytest.mark.parametrize("size", [(1, 64), (1, 88), (2, 7)], ids=str)
def test_shared_attention(size: tuple[int, int], mask: str, dtype: str) -> None:
    most = AT_ONCE[dtype]
    lengths = [
        ([most], [0]),
        ([most + 1], [0]),
        ([0, 3], [most + 40, 5]),
        ([most + 400, 3, most - 300], [20, most // 2, 350]),
        ([2 * most], [1]),
    ]
    for number, (vision, text) in enumerate(lengths):
        case = Attention(DTYPES[dtype], vision, text, *size, sharpness=(1.0, 8.0)[number % 2])
        ours = check(case, mask)
        chosen = every_third(case)
        assert torch.equal(case.run(mask, chosen=chosen), ours[case.chosen_rows(chosen)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
def test_tops_that_rise_and_fall_from_range_to_range(direction: int, dtype: str) -> None:
    case = Attention(DTYPES[dtype], [3000], [0], 1, 16)
    slope = torch.linspace(-12, 12, 3000) * direction
    case.q[:, 0] = 4.0
    case.k[:, 0] = slope.to(case.k.dtype)
    check(case, "bidirectional")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["bidirectional", "seq2seq", "causal"])
def test_a_mask_tensor_hides_whole_ranges(mask: str, dtype: str) -> None:
    case = Attention(DTYPES[dtype], [1500, 3], [30, 1100], 1, 24)
    places = 1500 + 1100
    seen = torch.rand(2, places, places) > 0.3
    seen[0, :, 600:2000:2] = False
    seen[0, 0:300, :1312] = False  # the first range of two or three
    seen[0, 300:600, 800:] = False  # all but the first
    seen[0, 600:700] = False  # all
    ours = check(case, mask, seen)
    assert not ours[600:700].any()
    chosen = every_third(case)
    some = case.run(mask, chosen=chosen, seen=seen)
    assert torch.equal(some, ours[case.chosen_rows(chosen)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_a_hidden_range_do_not_matter(dtype: str) -> None:
    case = Attention(DTYPES[dtype], [2600], [0], 1, 24)
    seen = torch.ones(2600, 2600, dtype=torch.bool)
    seen[:300, :1312] = False
    wanted = case.run("bidirectional", seen=seen)
    case.v[100] = math.inf
    ours = case.run("bidirectional", seen=seen)
    assert torch.equal(ours[:300], wanted[:300])
    assert not ours[300:].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 1100, 2999])
def test_no_number_among_the_keys_stays_one(place: int, dtype: str) -> None:
    """Whichever range it is in, and whatever comes behind it; queries that do not see it keep theirs."""
    case = Attention(DTYPES[dtype], [3000], [0], 1, 16)
    wanted = case.run("causal")
    case.k[place, 3] = math.nan
    ours = case.run("causal")
    assert ours[place:].isnan().all()
    tile = place // 32 * 32  # rows of one tile share its products
    assert torch.equal(ours[: max(tile - 32, 0)], wanted[: max(tile - 32, 0)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_attention(dtype: str) -> None:
    for front in (0, 70):
        case = Cached(DTYPES[dtype], 4100 + front, 3, [2, 0], 1, 64, 2.0)
        case.seen[1, 1, front:3000] = False
        if front:
            case.pack(front)
        plain, truth = (case.formula(t) for t in (DTYPES[dtype], torch.float64))
        result = op_parity(case.run(), plain, truth)
        assert result.passed, result.reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_shared_out(dtype: str) -> None:
    """More queries than a thread keeps the state of, on one thread and on several."""
    g = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(rows, 8, generator=g).to(DTYPES[dtype]) for rows in (9000, 2100))
    offsets = [cumulative([n]) for n in (2100, 0, 9000, 0)]
    positions = torch.zeros(9000, dtype=torch.int32)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(OPS.shared_attention(q, kv, kv, *offsets, positions, 1, 0.3, "bidirectional"))
    assert torch.equal(*found)
    some = torch.arange(0, 9000, 97)
    scores = q[some].double() @ kv.double().T * 0.3
    truth = scores.softmax(-1) @ kv.double()
    plain = (q[some] @ kv.T * 0.3).softmax(-1) @ kv
    result = op_parity(found[0][some], plain, truth)
    assert result.passed, result.reason
