"""shared_attention in CUDA C++, emulated: against the formula in fp64, and what a launch leaves and leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import (
    MASKS,
    AttentionCase,
    AttentionOperands,
    attention_operands,
    plain_attention,
    run_attention,
)
from attention_emulation import EAGER, LATE, RANDOM, Launch, Result, attend
from op_cases import assert_near
from torch import Tensor

from beit3_fast.layout import TokenLayout
from beit3_fast.parity import op_parity

WHOLE = (64, 128, 200, 256)
STEPS = 257
FORMS = {
    # One processor: a thread block has several query tiles.
    **{f"whole {keys}": Launch(keys, processors=1) for keys in WHOLE},
    "steps": Launch(STEPS, processors=3),
    "portable": Launch(portable=True),
}
HEADS = ((2, 64), (1, 88))
# Vision and text rows of the samples of a batch, each with at least one form's odd edge.
BATCHES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one row": ((1,), (0,)),
    "images": ((61, 64, 3), (0, 0, 0)),
    "texts": ((0, 0, 0), (1, 33, 63)),
    "pairs": ((5, 49, 13), (17, 7, 51)),
    "mixed": ((9, 0, 63, 0), (0, 21, 1, 0)),
    "197": ((197,), (0,)),
    "197 and 31": ((197,), (31,)),
    "577": ((577,), (0,)),
    "160 and 156": ((131, 100), (29, 56)),
    "260 and 31": ((260,), (31,)),
    "neighbours": ((9, 14), (5, 11)),
}
# The gate's share of the cases; the rest is for the long run.
GATE = {
    ("whole 64", "texts"),
    ("whole 64", "one row"),
    ("whole 128", "pairs"),
    ("whole 200", "197"),
    ("whole 256", "197 and 31"),
    ("steps", "one row"),
    ("steps", "260 and 31"),
    ("portable", "pairs"),
    ("portable", "197"),
}
ISOLATION_GATE = {("whole 64", 88), ("whole 200", 64), ("steps", 64), ("portable", 88)}
# Slow forms that share their source with the others.
QUICK_FORMS = [
    pytest.param(form, marks=pytest.mark.full if form in ("whole 128", "whole 256") else ())
    for form in FORMS
]


def longest(batch: str) -> int:
    return max(map(sum, zip(*BATCHES[batch], strict=True)))


def fits(form: str, batch: str) -> bool:
    return not 0 < FORMS[form].keys < min(STEPS, longest(batch))


def cases() -> list[tuple[str, AttentionCase]]:
    """Every form with every batch that it takes; masks, widths, dtypes, selections and layouts in turn."""
    pairs = [(form, batch) for form in FORMS for batch in BATCHES if fits(form, batch)]
    selections = ("all", "all", "first first", "none all", "none some")
    found = []
    for i, (form, batch) in enumerate(pairs):
        selection = selections[i % 5] if batch in ("pairs", "197 and 31", "260 and 31") else "all"
        inputs = ("normal", "saturated", "outliers", "mean")[i % 4]
        dtype, layout = ("bf16", "fp16")[i // 2 % 2], ("fused", "contiguous")[i // 3 % 2]
        if dtype == "fp16" and inputs == "outliers":
            inputs = "small"  # scores beyond the numbers of fp16 would be compared with PyTorch's infinities
        mask, heads = MASKS[i % 3], HEADS[(i + i // 2) % 2]
        case = AttentionCase("cuda", dtype, batch, heads, mask, selection, inputs, layout, False)
        found.append((form, case))
    return found


def operands_of(case: AttentionCase) -> AttentionOperands:
    return attention_operands(case, BATCHES)


def run(case: AttentionCase, operands: AttentionOperands, launch: Launch) -> Result:
    q, k, v, layout, queries, mask = operands
    assert isinstance(mask, str)
    return attend(q, k, v, layout, queries, case.heads[0], mask, launch)


@pytest.mark.parametrize(
    ("form", "case"),
    [
        pytest.param(
            form,
            case,
            id=f"{form}-{case.name}",
            marks=() if (form, case.tokens) in GATE else pytest.mark.full,
        )
        for form, case in cases()
    ],
)
def test_forward(form: str, case: AttentionCase) -> None:
    operands = operands_of(case)
    if not len(operands.q):
        pytest.skip("nothing was selected")
    done = run(case, operands, FORMS[form])
    q, k, v = (t.double() for t in operands[:3])
    wide = operands._replace(q=q, k=k, v=v)
    truth = run_attention(wide, case, "reference")
    assert_near(op_parity(done.o, plain_attention(operands, case.heads[0]), truth), case)
    assert_moments(done, case.heads[0])


def assert_moments(done: Result, num_heads: int) -> None:
    heads = done.o.double().unflatten(1, (num_heads, -1))
    mean = heads.mean(2)
    squares = (heads - mean[..., None]).square().sum(2)
    torch.testing.assert_close(done.parts[..., 0].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(done.parts[..., 1].double(), squares, rtol=1e-5, atol=1e-6)


def test_the_cases_meet_every_form_with_every_mask_and_both_widths() -> None:
    met = {(form, case.mask) for form, case in cases()}
    assert met == {(form, mask) for form in FORMS for mask in MASKS}
    assert {(form, case.heads[1]) for form, case in cases()} == {
        (form, width) for form in FORMS for _, width in HEADS
    }


def operands(
    batch: str, heads: tuple[int, int] = (2, 64), dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, TokenLayout]:
    """q, k and v as slices of one tensor, and where their rows lie."""
    layout = TokenLayout.from_lengths(*BATCHES[batch])
    width = math.prod(heads)
    fused = torch.randn(layout.num_rows, 3 * width).to(dtype)
    q, k, v = fused.split(width, 1)
    return q, k, v, layout


@pytest.mark.parametrize("keys", [129, 160, 161, 208, 209, 256])
def test_last_blocks_of_every_size(keys: int) -> None:
    """Behind 128 keys, heads of 64 multiply by 32, 80 or 128 more."""
    layout = TokenLayout.from_lengths((keys - 7,), (7,))
    q, k, v = torch.randn(keys, 3 * 64).to(torch.float16).split(64, 1)
    done = attend(q, k, v, layout, None, 1, "bidirectional", FORMS["steps"])
    truth = (q.double() @ k.double().mT / 8).softmax(1) @ v.double()
    plain = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    assert_near(op_parity(done.o, plain, truth), keys)


@pytest.mark.parametrize(
    ("form", "mask"), [("whole 128", "causal"), ("steps", "seq2seq"), ("portable", "bidirectional")]
)
def test_log_sum_exp(form: str, mask: str) -> None:
    q, k, v, layout = operands("pairs")
    done = attend(q, k, v, layout, None, 2, mask, FORMS[form])
    for sample in range(layout.batch_size):
        rows = [row for own in layout.segments(sample) for row in range(own.start, own.stop)]
        own_q, own_k = (t[rows].double().unflatten(1, (2, 64)).transpose(0, 1) for t in (q, k))
        scores = own_q @ own_k.mT / 8
        place = torch.arange(len(rows))
        limit = {
            "bidirectional": torch.full_like(place, len(rows)),
            "causal": place + 1,
            "seq2seq": (place + 1).clamp(min=layout.vision_lengths[sample]),
        }[mask]
        scores = scores.masked_fill(place >= limit[:, None], -math.inf)
        expected = scores.logsumexp(2).mT / math.log(2)
        torch.testing.assert_close(done.lse[rows].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "width"),
    [
        pytest.param(form, width, marks=() if (form, width) in ISOLATION_GATE else pytest.mark.full)
        for form in FORMS
        for _, width in HEADS
    ],
)
def test_nothing_of_another_sample_or_head_is_seen(form: str, width: int) -> None:
    """NaN in all other rows, and in all other heads, changes no bit."""
    heads = (2, width)
    q, k, v, layout = operands("neighbours", heads, torch.float16)
    clean = attend(q, k, v, layout, None, heads[0], "bidirectional", FORMS[form])
    kept = torch.zeros(layout.num_rows, dtype=torch.bool)
    for segment in layout.segments(0):
        kept[segment] = True
    for t in (q, k, v):
        t[~kept] = torch.nan
        t[:, heads[1] :] = torch.nan
    done = attend(q, k, v, layout, None, heads[0], "bidirectional", FORMS[form])
    for now, before in zip(
        (done.o[kept, : heads[1]], done.lse[kept, 0], done.parts[kept, 0]),
        (clean.o[kept, : heads[1]], clean.lse[kept, 0], clean.parts[kept, 0]),
        strict=True,
    ):
        assert torch.equal(now, before)
    assert done.o[~kept].isnan().all()


@pytest.mark.parametrize("form", QUICK_FORMS)
def test_a_nan_of_its_own_is_not_hidden(form: str) -> None:
    q, k, v, layout = operands("neighbours")
    v[0, 3] = torch.nan
    done = attend(q, k, v, layout, None, 2, "bidirectional", FORMS[form])
    own = torch.zeros(layout.num_rows, dtype=torch.bool)
    for segment in layout.segments(0):
        own[segment] = True
    assert torch.equal(done.o.isnan().any(1), own)


@pytest.mark.parametrize("form", QUICK_FORMS)
def test_the_order_of_events_changes_no_bit(form: str) -> None:
    batch = "260 and 31" if form == "steps" else "neighbours"
    q, k, v, layout = operands(batch, (1, 88))
    launch = FORMS[form]
    first = attend(q, k, v, layout, None, 1, "causal", launch)
    for order, seed, processors in ((EAGER, 0, 1), (LATE, 0, 7), (RANDOM, 1, 3)):
        again = launch._replace(order=order, seed=seed, processors=processors)
        for now, before in zip(
            attend(q, k, v, layout, None, 1, "causal", again)[:3], first[:3], strict=True
        ):
            assert torch.equal(now, before)


@pytest.mark.parametrize("form", QUICK_FORMS)
def test_a_query_that_sees_no_key_gives_zeros(form: str) -> None:
    """A sample with queries and no keys, as no selection makes one."""
    q, k, v, layout = operands("neighbours")
    fewer = TokenLayout.from_lengths((0, *layout.vision_lengths[1:]), (0, *layout.text_lengths[1:]))
    keys = TokenLayout(**{**vars_of(fewer), "order": (0, 1)})
    own = slice(0, keys.num_rows)
    done = attend(q, k[own], v[own], keys, layout, 2, "bidirectional", FORMS[form])
    blind = [row for segment in layout.segments(0) for row in range(segment.start, segment.stop)]
    assert not done.o[blind].any()
    assert not done.parts[blind].any()
    assert done.lse[blind].eq(-math.inf).all()
    assert done.o.isfinite().all()


def vars_of(layout: TokenLayout) -> dict[str, object]:
    return {name: getattr(layout, name) for name in TokenLayout.__dataclass_fields__}


@pytest.mark.parametrize("form", ["whole 128", "steps", "portable"])
def test_a_scale_of_zero_gives_the_mean_of_what_is_seen(form: str) -> None:
    q, k, v, layout = operands("pairs")
    done = attend(q, k, v, layout, None, 2, "seq2seq", FORMS[form], scale=0.0)
    vision, _ = layout.segments(1)
    mean = v[vision].double().mean(0)
    torch.testing.assert_close(
        done.o[vision].double(), mean.expand(vision.stop - vision.start, -1), rtol=1e-2, atol=1e-3
    )


def test_what_the_kernels_do_not_take_is_named() -> None:
    q, k, v, layout = operands("neighbours", (2, 32))
    with pytest.raises(AssertionError, match="heads of 64 or 88 columns"):
        attend(q, k, v, layout, None, 2, "causal", Launch())
    q, k, v, layout = operands("neighbours")
    with pytest.raises(AssertionError, match="do not overlap"):
        attend(q, k, v.as_strided(v.shape, (8, 1)), layout, None, 2, "causal", Launch())
    none = TokenLayout.from_lengths((0, 0), (0, 0))
    with pytest.raises(AssertionError, match="at least one key"):
        attend(q, k[:0], v[:0], none, layout, 2, "causal", Launch())
