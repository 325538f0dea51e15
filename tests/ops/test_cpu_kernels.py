"""The compiled CPU ops called directly, at every instruction-set level of this machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from cpu_cases import DTYPES, OPS, Attention, Cached, Linear, cumulative
from fence import Fence

from beit3_fast.parity import op_parity

LEVELS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16")
# Files beside this one, test_*.py, but for what takes longest.
ALSO_AT_LOWER_LEVELS = (
    *("attention_gradients", "cpu_special_values", "likeliest", "gradient_steps", "cpu_blocks"),
    *("cpu_far_rows", "patch_embedding", "cached_attention", "row_statistics"),
)
MANY_KEYS = (
    "test_tops_that_rise_and_fall_from_range_to_range",
    "test_a_mask_tensor_hides_whole_ranges",
)
SHAPES = [
    (40, 1, 1),
    (1, 64, 160),
    (3, 40, 200),
    (5, 7, 3),
    (6, 96, 70),
    (13, 31, 95),
    (25, 65, 33),
]
SHAPES += [(37, 33, 144), (100, 768, 130), (197, 256, 96)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_expert_linear_sizes(shape: tuple[int, int, int], dtype: str) -> None:
    for case in range(16):
        norm, gelu, residual, gather = (bool(case >> bit & 1) for bit in range(4))
        Linear(
            DTYPES[dtype],
            shape,
            experts=1 + case % 3,
            norm=norm,
            activation="gelu" if gelu else "none",
            residual=residual,
            gather=gather,
            packed=(case * 7) % 5 > 1,
            seed=case,
        ).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["mean", "outlier", "spike", "steps", "constant"])
def test_expert_linear_values(values: str, dtype: str) -> None:
    for shape in [(9, 768, 40), (30, 65, 40)]:
        Linear(DTYPES[dtype], shape, values=values, activation="gelu").check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_linear_without_rows(dtype: str) -> None:
    case = Linear(DTYPES[dtype], (4, 32, 48), experts=2)
    assert case.run(x=case.x[:0], bounds=[0, 0, 0]).shape == (0, 48)
    none = case.run(rows=torch.empty(0, dtype=torch.int64), bounds=[0, 0, 0])
    assert torch.equal(none, torch.zeros(4, 48, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_linear_rows_do_not_meet(dtype: str) -> None:
    """A row's result has the same bits alone, in any batch, on any number of threads."""
    case = Linear(DTYPES[dtype], (150, 130, 100), activation="gelu", residual=True)
    whole = case.run()
    assert case.residual is not None
    for first, last in [(0, 1), (3, 5), (10, 16), (0, 7), (50, 149)]:
        part = case.run(
            x=case.x[first:last],
            residual=case.residual[first:last],
            bounds=[0, last - first],
        )
        assert torch.equal(part, whole[first:last])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(case.run(), whole)
    assert torch.equal(case.run(packed=[]), whole)


@pytest.mark.parametrize("rows", [5, 700, 1570])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_are_shared_out_among_threads(dtype: str, rows: int) -> None:
    """Of few rows, and of the blocks left when all threads had as many: no column is left over."""
    case = Linear(DTYPES[dtype], (rows, 40, 330), experts=2, residual=True)
    case.check()
    whole = case.run()
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        assert torch.equal(case.run(), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_weight_may_lie_apart(dtype: str) -> None:
    case = Linear(DTYPES[dtype], (6, 40, 70), experts=2)
    wanted = case.run()
    wide = [torch.full((70, 47), math.nan, dtype=DTYPES[dtype]) for _ in case.weights]
    apart = [own[:, 3:43].copy_(weight) for own, weight in zip(wide, case.weights, strict=True)]
    assert torch.equal(case.run(weights=apart, packed=[]), wanted)
    assert torch.equal(case.run(packed=[OPS.pack_weight(weight) for weight in apart]), wanted)


def test_parameters_of_an_earlier_call_are_not_read() -> None:
    for dtype in DTYPES.values():
        wide, narrow = Linear(dtype, (4, 130, 100)), Linear(dtype, (4, 33, 17))
        clean = narrow.run()
        spoilt = {
            name: [torch.full_like(t, math.nan) for t in wide.arguments()[name]]
            for name in ("biases", "norm_weights", "norm_biases")
        }
        assert wide.run(**spoilt).isnan().all()
        assert torch.equal(narrow.run(), clean)


def test_parameters_may_stay_fp32() -> None:
    case = Linear(torch.bfloat16, (20, 64, 64))
    wide = case.run(
        biases=[t.float() for t in case.biases],
        norm_weights=[t.float() for t in case.norm],
        norm_biases=[t.float() for t in case.shift],
    )
    assert torch.equal(wide, case.run())


LENGTHS = [
    ([5], [3]),
    ([1], [0]),
    ([0, 0], [1, 40]),
    ([197, 0, 30], [8, 9, 0]),
    ([50, 70, 32, 16], [33, 12, 0, 17]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["bidirectional", "seq2seq", "causal"])
@pytest.mark.parametrize("size", [(3, 64), (2, 88), (1, 7), (2, 1), (1, 130)], ids=str)
def test_shared_attention(size: tuple[int, int], mask: str, dtype: str) -> None:
    for number, (vision, text) in enumerate(LENGTHS):
        for sharpness in (1.0, 40.0):
            case = Attention(DTYPES[dtype], vision, text, *size, sharpness=sharpness, seed=number)
            ours = case.run(mask)
            truth = case.formula(mask, torch.float64)
            result = op_parity(ours, case.formula(mask, DTYPES[dtype]), truth)
            assert result.passed, result.reason
            # Some queries alone: the same bits as among all.
            chosen = ([list(range(0, n, 3)) for n in vision], [list(range(1, n, 2)) for n in text])
            some = case.run(mask, chosen=chosen)
            assert torch.equal(some, ours[case.chosen_rows(chosen)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["bidirectional", "seq2seq", "causal"])
@pytest.mark.parametrize("size", [(3, 64), (2, 88), (1, 7)], ids=str)
def test_shared_attention_by_a_mask_tensor(size: tuple[int, int], mask: str, dtype: str) -> None:
    """Keys of both segments hidden one by one, in a mask of its own for each sample or one for all."""
    for number, (vision, text) in enumerate(LENGTHS):
        case = Attention(DTYPES[dtype], vision, text, *size, seed=number)
        places = max(vision) + max(text)
        seen = torch.rand(len(vision), places, places) > 0.3
        seen[:, 0] = False
        for own in (seen, seen[0]):
            ours = case.run(mask, seen=own)
            plain, truth = (case.formula(mask, t, own) for t in (DTYPES[dtype], torch.float64))
            result = op_parity(ours, plain, truth)
            assert result.passed, result.reason
            chosen = ([list(range(0, n, 3)) for n in vision], [list(range(1, n, 2)) for n in text])
            some = case.run(mask, chosen=chosen, seen=own)
            assert torch.equal(some, ours[case.chosen_rows(chosen)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposed_weight_is_packed_to_the_same_bytes(dtype: str) -> None:
    for rows, columns in [(1, 1), (33, 7), (7, 33), (64, 96), (100, 61)]:
        wide = torch.randn(columns, rows + 3).to(DTYPES[dtype])
        wide[:, -1] = math.nan
        ours = OPS.pack_transposed(wide[:, 2:-1])
        assert torch.equal(ours, OPS.pack_weight(wide[:, 2:-1].T.contiguous())), (rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 88, 7, 1, 130])
def test_cached_attention(width: int, dtype: str) -> None:
    for keys, queries, samples in [(1, 1, [0]), (37, 3, [2, 0]), (200, 6, [1]), (16, 5, [0, 1, 2])]:
        for sharpness in (0.0, 1.0, 4.0):
            case = Cached(DTYPES[dtype], keys, queries, samples, 2 + 16 // width, width, sharpness)
            ours = case.run()
            plain, truth = (case.formula(t) for t in (DTYPES[dtype], torch.float64))
            result = op_parity(ours, plain, truth)
            assert result.passed, result.reason
            assert not ours[0, 0].any()
        case.scale = 0.0  # the mean of what is seen
        plain, truth = (case.formula(t) for t in (DTYPES[dtype], torch.float64))
        result = op_parity(case.run(), plain, truth)
        assert result.passed, result.reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 88, 7, 1, 130])
def test_cached_attention_with_packed_keys(width: int, dtype: str) -> None:
    """Fewer packed keys than a panel, whole panels, and some more; none, one and many keys behind them."""
    shapes = [(1, 1, 1), (37, 36, 3), (200, 64, 6), (40, 40, 13), (97, 33, 5)]
    for keys, front, queries in shapes:
        for sharpness in (1.0, 4.0):
            case = Cached(DTYPES[dtype], keys, queries, [2, 0], 2 + 16 // width, width, sharpness)
            case.pack(front)
            plain, truth = (case.formula(t) for t in (DTYPES[dtype], torch.float64))
            result = op_parity(case.run(), plain, truth)
            assert result.passed, (keys, front, result.reason)
        case.scale = 0.0
        plain, truth = (case.formula(t) for t in (DTYPES[dtype], torch.float64))
        result = op_parity(case.run(), plain, truth)
        assert result.passed, (keys, front, result.reason)


def test_what_is_not_given_of_a_cache_may_be_anything() -> None:
    """Not a number behind the keys that are given, and in samples that are not named, reaches no result."""
    for dtype in DTYPES.values():
        case = Cached(dtype, 37, 3, [2, 0], 2, 64)
        clean = case.run()
        case.cache[:, :, 37:] = math.nan
        case.cache[:, 1] = math.nan
        assert torch.equal(case.run(), clean)


def test_queries_without_keys_are_zero() -> None:
    for dtype in DTYPES.values():
        q, kv = torch.randn(3, 16).to(dtype), torch.randn(2, 16).to(dtype)
        offsets = (cumulative([0, 2]), cumulative([0, 0]), cumulative([2, 1]), cumulative([0, 0]))
        out = OPS.shared_attention(q, kv, kv, *offsets, None, 2, 0.3, "bidirectional")
        assert torch.equal(out[:2], torch.zeros(2, 16, dtype=dtype))
        assert (out[2] != 0).all()


def test_a_score_of_minus_infinity_has_no_weight() -> None:
    q = torch.tensor([[1e30, 1.0]])
    k = torch.tensor([[-1e30, 0.0], [0.0, 1.0], [0.0, 1.0]])
    v = torch.tensor([[7.0, 7.0], [1.0, 2.0], [3.0, 4.0]])
    for dtype in DTYPES.values():
        offsets = (cumulative([3]), cumulative([0]), cumulative([1]), cumulative([0]))
        operands = (t.to(dtype) for t in (q, k, v))
        out = OPS.shared_attention(*operands, *offsets, None, 1, 1.0, "bidirectional")
        assert out.tolist() == [[2.0, 3.0]]


def test_scores_of_any_size_have_their_weights() -> None:
    """Exponents by a shift that is rounded before the difference is taken end as zeros or NaN."""
    k, v = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.5, 0.0], [1.0, 0.0]]), torch.eye(4)[:, :2]
    for dtype in DTYPES.values():
        for size in (1e3, 1e5, 1e9, 3e9, 1e10, 1e12, 1e15, 1e30):
            q = torch.tensor([[size, 0.0], [-size, 0.0]])
            offsets = (cumulative([4]), cumulative([0]), cumulative([2]), cumulative([0]))
            operands = [t.to(dtype) for t in (q, k, v)]
            out = OPS.shared_attention(*operands, *offsets, None, 1, 1.0, "bidirectional")
            assert out.tolist() == [[0.5, 0.0], [0.0, 1.0]], (dtype, size)


def test_shared_attention_ignores_threads() -> None:
    case = Attention(torch.bfloat16, [500, 3], [20, 450], 1, 64)
    whole = case.run("causal")
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(case.run("causal"), whole)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages without access")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_outside_its_tensor(dtype: str, at_end: bool) -> None:
    """A read past an end would end the process: sanitizers see no masked loads. 785 rows end in a lower tile."""
    fence = Fence(at_end)
    for shape in [(5, 33, 17), (13, 40, 100), (3, 7, 33), (26, 64, 64), (785, 16, 17)]:
        for packed in (True, False):
            case = Linear(DTYPES[dtype], shape, activation="gelu", residual=True, packed=packed)
            wanted = case.run()
            names = ("weights", "packed", "biases", "norm", "shift")
            for name in names:
                setattr(case, name, [fence(t) for t in getattr(case, name)])
            assert case.residual is not None
            case.x, case.residual = fence(case.x), fence(case.residual)
            assert torch.equal(case.run(), wanted)
            OPS.pack_weight(case.weights[0])
    for width in (7, 64, 88):
        attention = Attention(DTYPES[dtype], [5, 33], [3, 0], 1, width)
        wanted = attention.run("causal")
        attention.q, attention.k, attention.v = map(fence, (attention.q, attention.k, attention.v))
        assert torch.equal(attention.run("causal"), wanted)
    fence.open()


@pytest.mark.skipif("BEIT3_FAST_CPU_ISA" in os.environ, reason="this is the inner run")
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_lower_levels(level: str) -> None:
    """All of the above and what else runs on these kernels, in a process that may use no more than this level."""
    if LEVELS.index(level) >= LEVELS.index(OPS.cpu_isa()):
        pytest.skip(f"this CPU's own level is {OPS.cpu_isa()}")
    environment = os.environ | {"BEIT3_FAST_CPU_ISA": level, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += [__file__.replace("cpu_kernels", own) for own in ALSO_AT_LOWER_LEVELS]
    many_keys = __file__.replace("cpu_kernels", "attention_many_keys")
    command += [f"{many_keys}::{own}" for own in MANY_KEYS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_level_is_what_was_asked_for() -> None:
    wish = os.environ.get("BEIT3_FAST_CPU_ISA")
    assert OPS.cpu_isa() in LEVELS
    assert wish is None or OPS.cpu_isa() == wish
