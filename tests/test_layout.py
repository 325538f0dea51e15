"""TokenLayout: one set of rows, and every way of describing them agrees with every other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from beit3_fast.errors import ShapeError
from beit3_fast.layout import TokenLayout

LENGTHS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=7)
PICKS = st.sampled_from(("all", "first", "none"))


def layout_of(lengths: list[tuple[int, int]]) -> TokenLayout:
    return TokenLayout.from_lengths([v for v, _ in lengths], [t for _, t in lengths])


def test_one_example_by_hand() -> None:
    layout = TokenLayout.from_lengths([2, 0, 3, 2], [1, 4, 0, 2])
    # image only first, then pairs, then text only, each in the caller's order
    assert layout.order == (2, 0, 3, 1)
    assert layout.vision_lengths == (3, 2, 2, 0)
    assert layout.text_lengths == (0, 1, 2, 4)
    assert (layout.image_only, layout.text_only, layout.batch_size) == (1, 1, 4)
    assert (layout.num_vision_rows, layout.num_text_rows, layout.num_rows) == (7, 7, 14)
    assert layout.cu_vision.tolist() == [0, 3, 5, 7, 7]
    assert layout.cu_text.tolist() == [0, 0, 1, 3, 7]
    assert layout.cu_vision.dtype == layout.cu_text.dtype == torch.int32
    assert layout.sample_of_row.tolist() == [2, 2, 2, 0, 0, 3, 3, 0, 3, 3, 1, 1, 1, 1]
    assert layout.expert_bounds("A") == (0, 14)
    assert layout.expert_bounds("AB") == (0, 7, 14)
    assert layout.expert_bounds("ACB") == (0, 3, 10, 14)
    assert layout.segments(1) == (slice(3, 5), slice(7, 8))
    rows, chosen = layout.select("first", "first")
    assert rows.tolist() == [0, 3, 5, 7, 8, 10]
    assert chosen.vision_lengths == (1, 1, 1, 0)
    assert chosen.text_lengths == (0, 1, 1, 1)
    assert chosen.positions is not None
    assert chosen.positions.tolist() == [0] * 6
    rows, chosen = layout.select("none", torch.tensor([0, 1, 1, 0, 1, 0, 1]).bool())
    assert rows.tolist() == [8, 9, 11, 13]
    assert chosen.text_lengths == (0, 0, 2, 2)
    assert chosen.positions is not None
    assert chosen.positions.tolist() == [0, 1, 1, 3]
    assert chosen.positions.dtype == torch.int32


@given(LENGTHS)
def test_rows_are_shared_out_once(lengths: list[tuple[int, int]]) -> None:
    layout = layout_of(lengths)
    assert sorted(layout.order) == list(range(len(lengths)))
    assert layout.num_rows == sum(v + t for v, t in lengths)
    owners = [-1] * layout.num_rows
    for packed, sample in enumerate(layout.order):
        vision, text = layout.segments(packed)
        assert vision.stop - vision.start == layout.vision_lengths[packed] == lengths[sample][0]
        assert text.stop - text.start == layout.text_lengths[packed] == lengths[sample][1]
        assert vision.stop <= layout.num_vision_rows <= text.start
        for row in (*range(vision.start, vision.stop), *range(text.start, text.stop)):
            assert owners[row] == -1
            owners[row] = sample
    assert owners == layout.sample_of_row.tolist()


@given(LENGTHS)
def test_offsets_are_the_running_lengths(lengths: list[tuple[int, int]]) -> None:
    layout = layout_of(lengths)
    for cu, own in (
        (layout.cu_vision, layout.vision_lengths),
        (layout.cu_text, layout.text_lengths),
    ):
        assert cu[0] == 0
        assert tuple(cu.diff().tolist()) == own


@given(LENGTHS)
def test_experts_own_the_rows_of_their_kind(lengths: list[tuple[int, int]]) -> None:
    layout = layout_of(lengths)
    kind_of = ["A" if t == 0 else "C" if v else "B" for v, t in lengths]
    bounds = layout.expert_bounds("ACB")
    for expert, (start, stop) in zip("ACB", pairwise(bounds), strict=True):
        assert {kind_of[s] for s in layout.sample_of_row[start:stop].tolist()} <= {expert}
    assert bounds[0] == 0
    assert bounds[3] == layout.expert_bounds("AB")[2] == layout.expert_bounds("A")[1]
    assert layout.expert_bounds("AB") == (0, layout.num_vision_rows, layout.num_rows)
    assert bounds[3] == layout.num_rows


@given(LENGTHS, PICKS, PICKS, st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_selected_rows_and_their_layout(
    lengths: list[tuple[int, int]],
    vision: str,
    text: str,
    random: Any,
    named_vision: bool,
    named_text: bool,
) -> None:
    layout = layout_of(lengths)
    mask = [random.random() < 0.5 for _ in range(layout.num_rows)]
    split = layout.num_vision_rows
    picks: tuple[Any, Any] = (
        torch.tensor(mask[:split], dtype=torch.bool) if named_vision else vision,
        torch.tensor(mask[split:], dtype=torch.bool) if named_text else text,
    )
    rows, chosen = layout.select(*picks)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert chosen.num_rows == len(rows)
    assert chosen.order == layout.order
    assert torch.equal(chosen.sample_of_row, layout.sample_of_row[rows])
    assert chosen.positions is not None
    for packed in range(layout.batch_size):
        pairs = zip(layout.segments(packed), chosen.segments(packed), picks, strict=True)
        for whole, part, pick in pairs:
            kept = rows[part].tolist()
            assert chosen.positions[part].tolist() == [row - whole.start for row in kept]
            expected = list(range(whole.start, whole.stop))
            if isinstance(pick, Tensor):
                expected = [row for row in expected if mask[row]]
            elif pick != "all":
                expected = expected[: 1 if pick == "first" else 0]
            assert kept == expected


@given(LENGTHS)
def test_selecting_all_rows_changes_nothing(lengths: list[tuple[int, int]]) -> None:
    layout = layout_of(lengths)
    rows, chosen = layout.select("all", "all")
    assert rows.tolist() == list(range(layout.num_rows))
    assert chosen.vision_lengths == layout.vision_lengths
    assert chosen.text_lengths == layout.text_lengths
    assert chosen.expert_bounds("ACB") == layout.expert_bounds("ACB")
    every = torch.ones(layout.num_text_rows, dtype=torch.bool)
    assert layout.select("all", every).rows.tolist() == rows.tolist()


@given(LENGTHS)
def test_expert_ranges_of_a_selection(lengths: list[tuple[int, int]]) -> None:
    layout = layout_of(lengths)
    rows, chosen = layout.select("first", "first")
    whole, part = layout.expert_bounds("ACB"), chosen.expert_bounds("ACB")
    for expert in range(3):
        own = [r for r in rows.tolist() if whole[expert] <= r < whole[expert + 1]]
        assert own == rows[part[expert] : part[expert + 1]].tolist()


@pytest.mark.parametrize(
    ("lengths", "uniform"),
    [
        ([(5, 0), (5, 0)], True),
        ([(5, 0)], True),
        ([(5, 0), (4, 0)], False),
        ([(5, 0), (5, 1)], False),
        ([(0, 3)], True),
        ([(0, 3), (0, 4)], False),
        ([(5, 0), (0, 5)], False),
        ([(5, 3), (5, 3)], False),
    ],
)
def test_is_uniform(lengths: list[tuple[int, int]], uniform: bool) -> None:
    assert layout_of(lengths).is_uniform is uniform


def test_a_layout_is_frozen() -> None:
    layout = layout_of([(2, 1)])
    with pytest.raises(AttributeError):
        layout.order = (0,)  # type: ignore[misc]
    assert layout.cu_vision is layout.cu_vision


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ([1, 2], [1], "one entry per sample, got 2 and 1"),
        ([1], [], "one entry per sample, got 1 and 0"),
        ([-1], [2], r"must not be negative, got \[\(-1, 2\)\]"),
        ([1], [-2], "must not be negative"),
    ],
)
def test_lengths_that_do_not_fit(vision: list[int], text: list[int], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        TokenLayout.from_lengths(vision, text)


def test_unknown_experts_and_picks_are_named() -> None:
    layout = layout_of([(2, 1)])
    with pytest.raises(ValueError, match=r"'A', 'AB' or 'ACB', got 'BA'"):
        layout.expert_bounds("BA")
    with pytest.raises(ValueError, match=r"'all', 'first' or 'none', got 'last'"):
        layout.select("last", "none")  # type: ignore[arg-type]


def test_rows_to_keep_are_named_by_a_mask_of_the_segment() -> None:
    layout = layout_of([(2, 1)])
    with pytest.raises(ShapeError, match=r"vision rows to keep .* \[Rv\] = \[2\], got torch.bool"):
        layout.select(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"text rows to keep .* \[Rt\] = \[1\], got torch.int64"):
        layout.select(text=torch.ones(1, dtype=torch.int64))
