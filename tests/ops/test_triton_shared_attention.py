"""shared_attention in Triton: against the formula in fp64, and what the launch leaves behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from attention_cases import (
    LAYOUTS,
    MASKS,
    SELECTIONS,
    AttentionCase,
    AttentionOperands,
    attention_cases,
    attention_operands,
    farthest,
    from_what_is_saved,
    plain_attention,
    rows_and_names,
    run_attention,
    visible_keys,
)
from op_cases import DTYPES, Results, assert_draws_near, assert_near, draws_of
from torch import Tensor
from triton_cases import DEVICE, TARGETS, moments, one_target_each

from beit3_fast.errors import KernelUnavailable
from beit3_fast.kernels import _tiles
from beit3_fast.kernels import shared_attention as kernels
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import shared_attention
from beit3_fast.parity import op_parity


def structured(cases: Sequence[AttentionCase]) -> list[AttentionCase]:
    """The kernels take no mask tensor: those cases get a structure instead."""
    return [
        case if case.mask in MASKS else case._replace(mask=MASKS[place % 3])
        for place, case in enumerate(cases)
    ]


ALL_CASES = structured(attention_cases(6, TARGETS))
CASES = one_target_each(ALL_CASES[: len(LAYOUTS) * len(TARGETS)])
LONG_CASES = [case for case in ALL_CASES if case not in CASES]
DTYPE_NAMES = [dtype for _, dtype in TARGETS]


@torch.no_grad()
def check_forward(case: AttentionCase) -> None:
    operands = attention_operands(case)
    q, k, v = (t.double() for t in operands[:3])
    truth = run_attention(operands._replace(q=q, k=k, v=v), case, "reference")
    plain = plain_attention(operands, case.heads[0], truth)
    ours = run_attention(operands.on(DEVICE), case, "triton").cpu()
    assert_near(op_parity(ours, plain, truth), case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(case: AttentionCase) -> None:
    check_forward(case)


@pytest.mark.full
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_forward_long(case: AttentionCase) -> None:
    check_forward(case)


GRADIENT_INPUTS = ("normal", "peaked")
ALL_GRADIENT_CASES = structured(attention_cases(5, TARGETS, inputs=GRADIENT_INPUTS))
QUICK = ("an empty sample", "pairs", "mixed", "one of each", "no samples")
FIRST = ALL_GRADIENT_CASES[: len(LAYOUTS) * len(TARGETS)]
GRADIENT_CASES = [
    case
    for case in FIRST
    if case.tokens in QUICK and (case in one_target_each(FIRST)) is not (case.tokens == "mixed")
]
LONG_GRADIENT_CASES = [case for case in ALL_GRADIENT_CASES if case not in GRADIENT_CASES]


def gradients(operands: AttentionOperands, dtype: str, call: Any) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in operands[:3]]
    y = call(operands._replace(q=leaves[0], k=leaves[1], v=leaves[2]))
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    y.backward(seed.to(y))
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def check_gradients(case: AttentionCase) -> None:
    rows = attention_operands(case).q.shape[0]
    found = [results(attention_operands(case, draw=draw), case) for draw in draws_of(rows)]
    assert_draws_near(found, case.name)


def results(operands: AttentionOperands, case: AttentionCase) -> dict[str, Results]:
    on_device = operands.on(DEVICE)
    ours = gradients(on_device, case.dtype, lambda own: run_attention(own, case, "triton"))
    if operands.q.shape[0] == 0:
        assert not any(bool(t.any()) for t in ours)
        return {}
    plain = gradients(operands, case.dtype, lambda own: plain_attention(own, case.heads[0]))
    wide = operands._replace(q=operands.q.double(), k=operands.k.double(), v=operands.v.double())
    truth = gradients(wide, case.dtype, lambda own: run_attention(own, case, "reference"))
    # Where few keys have nearly all weight, the rounding of what is saved decides, which plain PyTorch may have right
    # by luck.
    saved = gradients(operands, case.dtype, lambda own: from_what_is_saved(own, case.heads[0]))
    plain = [farthest(both, own) for *both, own in zip(plain, saved, truth, strict=True)]
    found = {}
    for name, mine, theirs, expected in zip("qkv", ours, plain, truth, strict=True):
        if not bool(expected.any()):
            # One visible key each: q and k have no effect, and what is left is rounding.
            assert mine.abs().max() <= 100 * torch.finfo(mine.dtype).eps
            continue
        found[f"gradient of {name}"] = Results(mine.cpu(), theirs, expected)
    return found


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case.name)
def test_gradients(case: AttentionCase) -> None:
    check_gradients(case)


BACKWARD_TILES = sorted(
    {
        (tile["block_q"], tile["block_k"])
        for architecture in _tiles.ARCHITECTURES
        for shape_class, tile in _tiles.read(architecture)["shared_attention"].items()
        if "backward" in shape_class
    }
)


@pytest.mark.parametrize(
    ("blocks", "mask", "selection"),
    [
        (blocks, mask, "first all" if in_turn and not square else "all")
        for b, blocks in enumerate([*BACKWARD_TILES, (64, 16)])
        for m, mask in enumerate(MASKS)
        for in_turn, square in [((b - m) % 3 == 0, blocks[0] == blocks[1])]
        if in_turn or not square
    ],
)
def test_gradients_by_the_tiles_that_are_shipped(
    blocks: tuple[int, int], mask: str, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of keys that begin before, at and behind a tile of queries, and behind the last image token."""
    monkeypatch.setattr(_tiles, "choose", lambda *_: kernels.Tile(*blocks, 4, 1))
    how = ((1, 16), mask, selection, "normal", "contiguous", False)
    case = AttentionCase("triton", DTYPE_NAMES[-1], "two tiles of keys", *how)
    operands = attention_operands(case, {case.tokens: ((35, 5), (35, 0))})
    assert_draws_near([results(operands, case)], case.name)


def test_the_gate_meets_every_mask_and_both_widths() -> None:
    for cases in (CASES, GRADIENT_CASES):
        assert {case.mask for case in cases} == set(MASKS)
        assert {64, 88} <= {case.heads[1] for case in cases}


@pytest.mark.full
@pytest.mark.parametrize("case", LONG_GRADIENT_CASES, ids=lambda case: case.name)
def test_gradients_long(case: AttentionCase) -> None:
    check_gradients(case)


@pytest.mark.parametrize(
    ("mask", "selection"),
    [
        pytest.param(mask, selection, marks=() if (m - s) % 3 == 0 else pytest.mark.full)
        for m, mask in enumerate(MASKS)
        for s, selection in enumerate(SELECTIONS)
    ],
)
def test_every_mask_and_selection_with_lse_and_statistics(mask: str, selection: str) -> None:
    place = MASKS.index(mask) + SELECTIONS.index(selection)
    dtype, heads = DTYPE_NAMES[place % len(DTYPE_NAMES)], ((2, 64), (1, 88))[place // 2 % 2]
    case = AttentionCase("triton", dtype, "mixed", heads, mask, selection, "normal", "fused", False)
    operands = attention_operands(case)
    q, k, v, layout, queries, _ = operands.on(DEVICE)
    own = layout if queries is None else queries
    segments = [
        kernels.Segments(t.cu_vision, t.cu_text, t.longest, t.positions) for t in (layout, own)
    ]
    done = kernels.shared_attention(
        q,
        k,
        v,
        *segments,
        heads[0],
        heads[1] ** -0.5,
        mask,
        with_lse=True,
        with_statistics=True,
        tile=kernels.Tile(16, 16, 4, 1, whole=64 * (place // 3 % 2)),
    )
    q, k, v = (t.double() for t in operands[:3])
    truth = run_attention(operands._replace(q=q, k=k, v=v), case, "reference")
    plain = plain_attention(operands, heads[0], truth)
    assert_near(op_parity(done.o.cpu(), plain, truth), case)
    assert done.lse is not None
    assert done.statistics is not None
    assert done.statistics.width == heads[1]
    torch.testing.assert_close(
        done.statistics.parts.double(), moments(done.o, heads[1]), rtol=1e-4, atol=1e-6
    )
    expected = scores_lse(operands, heads, mask)
    natural = done.lse.cpu().double() * math.log(2)
    torch.testing.assert_close(natural, expected, rtol=1e-5, atol=1e-5)


def scores_lse(operands: AttentionOperands, heads: tuple[int, int], mask: str) -> Tensor:
    """fp64 [Rq, H]: log-sum-exp of every query's visible scores, by the tests' own walk of the layout."""
    q, k, _, layout, queries, _ = operands
    own = layout if queries is None else queries
    lse = torch.full((q.shape[0], heads[0]), math.nan, dtype=torch.float64)
    for sample in range(layout.batch_size):
        key_rows, key_names = rows_and_names(layout, sample)
        query_rows, names = rows_and_names(own, sample)
        if own.positions is not None:
            pairs = zip(query_rows, names, strict=True)
            names = [(kind, int(own.positions[row])) for row, (kind, _) in pairs]
        visible = visible_keys(mask, sample, names, key_names, max(layout.vision_lengths))
        own_q, own_k = (
            t[rows].double().unflatten(1, heads) for t, rows in ((q, query_rows), (k, key_rows))
        )
        scores = torch.einsum("qhd,khd->qhk", own_q, own_k) * heads[1] ** -0.5
        lse[query_rows] = scores.masked_fill(~visible[:, None], -math.inf).logsumexp(-1)
    return lse


def draw(rows: int, width: int, dtype: str = "fp32") -> Tensor:
    return torch.randn(rows, width).to(DTYPES[dtype]).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPE_NAMES[-1:])
def test_a_sample_that_is_not_finite_stays_alone(dtype: str) -> None:
    layout = TokenLayout.from_lengths((5, 9, 0), (4, 3, 6), DEVICE)
    q, k, v = (draw(layout.num_rows, 32, dtype) for _ in range(3))
    own = [i for part in layout.segments(1) for i in range(part.start, part.stop)]
    others = [i for i in range(layout.num_rows) if i not in own]
    for mask in MASKS:
        clean = shared_attention(q, k, v, layout, num_heads=2, mask=mask, impl="triton")
        place = MASKS.index(mask)
        operands = [q.clone(), k.clone(), v.clone()]
        operands[place][own[0]] = (math.nan, math.inf, -math.inf)[place]
        y = shared_attention(*operands, layout, num_heads=2, mask=mask, impl="triton")
        assert torch.equal(y[others], clean[others])
        assert not bool(y[own].isfinite().all())


@pytest.mark.parametrize(
    ("mask", "blocks"),
    [
        pytest.param(mask, blocks, marks=pytest.mark.full if (mask == "seq2seq") is wide else ())
        for mask in MASKS
        for blocks, wide in (((16, 32), True), ((32, 16), False))
    ],
)
def test_the_tile_changes_rounding_only(mask: str, blocks: tuple[int, int]) -> None:
    """Blocks that end before, at and behind the limits of a mask and the end of a sample."""
    layout = TokenLayout.from_lengths((16, 15, 33), (1, 1, 0), DEVICE)
    q, k, v = (draw(layout.num_rows, 26) for _ in range(3))
    own = kernels.Segments(layout.cu_vision, layout.cu_text, layout.longest)
    expected = shared_attention(q, k, v, layout, num_heads=2, mask=mask, impl="reference")
    tile = kernels.Tile(*blocks, 4, 1)
    o = kernels.shared_attention(q, k, v, own, own, 2, 13**-0.5, mask, tile=tile).o
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "width"),
    [("bidirectional", 13), ("seq2seq", 88), pytest.param("causal", 64, marks=pytest.mark.full)],
)
def test_whole_rows_of_scores(mask: str, width: int) -> None:
    """In three pieces, 224 = 128 + 64 + 32, over samples that end in each of them; a query is saturated."""
    layout = TokenLayout.from_lengths((180, 0, 5, 0), (17, 201, 1, 140), DEVICE)
    q, k, v = (draw(layout.num_rows, width) for _ in range(3))
    q[::9] *= 100
    own = kernels.Segments(layout.cu_vision, layout.cu_text, layout.longest)
    plain, truth = (
        shared_attention(*operands, layout, num_heads=1, mask=mask, impl=impl).cpu()
        for operands, impl in (
            ((q, k, v), "composite"),
            ((q.double(), k.double(), v.double()), "reference"),
        )
    )
    tile = kernels.Tile(64, 16, 4, 1, whole=256)
    o = kernels.shared_attention(q, k, v, own, own, 1, width**-0.5, mask, tile=tile).o
    assert_near(op_parity(o.cpu(), plain, truth), mask)


class Launches(list[dict[str, Any]]):
    """Stands for a kernel, and notes the named arguments of its launches."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **named: self.append(named)


@pytest.mark.parametrize(
    ("longest", "keys", "pieces"),
    [(1, 32, 1), (32, 32, 1), (33, 64, 1), (197, 224, 3), (256, 256, 1), (257, 0, 0)],
)
def test_the_form_is_chosen_by_the_longest_sample(
    longest: int, keys: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches()
    monkeypatch.setattr(kernels, "shared_attention_kernel", launches)
    layout = TokenLayout.from_lengths((longest, 1), (0, 0), DEVICE)
    q, k, v = (draw(longest + 1, 64, DTYPE_NAMES[-1]) for _ in range(3))
    own = kernels.Segments(layout.cu_vision, layout.cu_text, layout.longest)
    tile = kernels.Tile(64, 64, 4, 1, whole=256)
    kernels.shared_attention(q, k, v, own, own, 1, 0.125, "causal", tile=tile)
    assert [(own["KEYS"], own["PIECES"]) for own in iter(launches)] == [(keys, pieces)]


def test_scale() -> None:
    layout = TokenLayout.from_lengths((4,), (3,), DEVICE)
    q, k, v = (draw(7, 8) for _ in range(3))
    flat = shared_attention(q, k, v, layout, num_heads=2, scale=0.0, impl="triton")
    torch.testing.assert_close(flat, v.mean(0).expand(7, 8))
    doubled = shared_attention(q, k, v, layout, num_heads=2, scale=1.0, impl="triton")
    torch.testing.assert_close(
        doubled, shared_attention(2 * q, k, v, layout, num_heads=2, impl="triton")
    )


@pytest.mark.parametrize("width", [*range(1, 130), 255])
def test_a_head_is_split_where_that_pads_less(width: int) -> None:
    whole, rest = kernels.split_width(width)
    assert whole + rest >= width
    assert whole & (whole - 1) == 0
    assert rest & (rest - 1) == 0
    assert whole >= 16
    assert rest == 0 or rest >= 16
    assert whole + rest <= max(16, 2 ** math.ceil(math.log2(width)))
    if width == 88:
        assert (whole, rest) == (64, 32)


def test_a_mask_tensor_is_refused() -> None:
    layout = TokenLayout.from_lengths((2,), (2,), DEVICE)
    q, k, v = (draw(4, 8) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool, device=DEVICE).tril()
    with pytest.raises(KernelUnavailable, match="mask"):
        shared_attention(q, k, v, layout, num_heads=2, mask=mask, impl="triton")
