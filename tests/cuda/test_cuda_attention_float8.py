"""Attention's result in 8 bits: the rounding of its bfloat16 result by the scales of the sample's values."""

from __future__ import annotations

import pytest
import torch
from attention_emulation import Launch, Result, attend
from test_cuda_attention import BATCHES, STEPS
from torch import Tensor

from beit3_fast.float8 import BLOCK, Quantized, dequantize, quantize, quantize_by
from beit3_fast.layout import TokenLayout

FORMS = {
    "whole 64": Launch(64, processors=1),
    "whole 128": Launch(128, processors=1),
    "steps": Launch(STEPS, processors=3),
}
HEADS = ((2, 64), (3, 64), (1, 88), (3, 88))


def bits(rounded: Quantized) -> tuple[Tensor, Tensor]:
    return rounded.numbers.view(torch.uint8), rounded.scales.view(torch.int32)


def drawn(batch: str, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, TokenLayout]:
    """Values whose sizes differ by row, block of columns and sample."""
    layout = TokenLayout.from_lengths(*BATCHES[batch])
    width = heads[0] * heads[1]
    q, k, v = torch.randn(layout.num_rows, 3 * width).split(width, 1)
    v = v * torch.logspace(-3, 3, layout.num_rows)[:, None]
    v = v * 4.0 ** torch.arange(width).div(BLOCK, rounding_mode="floor")
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), layout


def scales_of(v: Tensor, layout: TokenLayout, queries: TokenLayout) -> Tensor:
    """The largest scale of each block of columns in the rows of v of a query's sample."""
    own = quantize(v).scales
    scales = torch.empty(queries.num_rows, own.shape[1])
    for sample in range(layout.batch_size):
        keys = torch.cat([own[segment] for segment in layout.segments(sample)])
        for segment in queries.segments(sample):
            scales[segment] = keys.amax(0)
    return scales


def run(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: int, form: str, stores: bool = True
) -> Result:
    # As they lie behind those of queries and keys.
    blocks = -(-v.shape[1] // BLOCK)
    beside = torch.full((len(v), 2 * blocks), torch.nan)
    v_scales = torch.cat([beside, quantize(v).scales], 1)[:, 2 * blocks :]
    mask = "seq2seq" if form == "whole 128" else "bidirectional"
    where = (layout, None, heads, mask, FORMS[form])
    return attend(q, k, v, *where, v_scales=v_scales, stores=stores)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("form", "batch"),
    [("whole 64", "neighbours"), ("whole 128", "pairs"), ("steps", "neighbours")],
)
def test_the_rounding_of_the_result(form: str, batch: str, heads: tuple[int, int]) -> None:
    q, k, v, layout = drawn(batch, heads)
    done = run(q, k, v, layout, heads[0], form)
    assert done.rounded is not None
    expected = quantize_by(done.o, scales_of(v, layout, layout))
    for ours, own in zip(bits(done.rounded), bits(expected), strict=True):
        assert torch.equal(ours, own)
    plain = attend(q, k, v, layout, None, heads[0], "bidirectional", FORMS[form])
    if form != "whole 128":
        assert torch.equal(done.o, plain.o)


@pytest.mark.parametrize("form", FORMS)
def test_the_result_in_8_bits_alone(form: str) -> None:
    q, k, v, layout = drawn("neighbours", (2, 64))
    both, alone = (run(q, k, v, layout, 2, form, stores) for stores in (True, False))
    assert both.rounded is not None
    assert alone.rounded is not None
    assert alone.o.isnan().all()
    assert torch.equal(alone.parts, both.parts)
    for ours, own in zip(bits(alone.rounded), bits(both.rounded), strict=True):
        assert torch.equal(ours, own)


def test_as_exact_as_by_its_own_scales() -> None:
    """Values of one size and attention that averages 577 of them: the result is some 20 times smaller."""
    layout = TokenLayout.from_lengths((577,), (0,))
    q, k, v = torch.randn(577, 3 * 128).bfloat16().split(128, 1)
    done = run(q, k, v, layout, 2, "steps")
    assert done.rounded is not None
    truth = done.o.double()
    ours, own = (
        float((dequantize(rounded).double() - truth).norm() / truth.norm())
        for rounded in (done.rounded, quantize(done.o))
    )
    assert ours < 1.05 * own


def test_what_is_not_finite_is_seen() -> None:
    q, k, v, layout = drawn("neighbours", (4, 64))
    clean = run(q, k, v, layout, 4, "whole 64")
    first = torch.zeros(layout.num_rows, dtype=torch.bool)
    for segment in layout.segments(0):
        first[segment] = True
    v[0, 70] = torch.inf
    spoiled = run(q, k, v, layout, 4, "whole 64")
    assert clean.rounded is not None
    assert spoiled.rounded is not None
    found = dequantize(spoiled.rounded)
    assert found[first, :BLOCK].isnan().all()
    assert found[first, BLOCK:].isfinite().all()
    assert torch.equal(found[~first], dequantize(clean.rounded)[~first])
    q, k, v, layout = drawn("neighbours", (4, 64))
    q[0, 0] = torch.nan
    found = dequantize(run(q, k, v, layout, 4, "whole 64").rounded)  # type: ignore[arg-type]
    assert found[0, :64].isnan().all()
    assert found[0, 64:].isfinite().all()
    assert found[1:].isfinite().all()


def test_a_query_that_sees_no_key_gives_zeros() -> None:
    q, k, v, layout = drawn("neighbours", (2, 64))
    keys = TokenLayout.from_lengths((0, *layout.vision_lengths[1:]), (0, *layout.text_lengths[1:]))
    keys = TokenLayout(
        **{n: getattr(keys, n) for n in keys.__dataclass_fields__} | {"order": (0, 1)}
    )
    own = slice(0, keys.num_rows)
    v_scales = quantize(v[own]).scales
    for form in FORMS:
        done = attend(
            q, k[own], v[own], keys, layout, 2, "bidirectional", FORMS[form], v_scales=v_scales
        )
        assert done.rounded is not None
        found = dequantize(done.rounded)
        for segment in layout.segments(0):
            assert not found[segment].any()
        assert found.isfinite().all()


def test_what_is_refused() -> None:
    q, k, v, layout = drawn("neighbours", (2, 64))
    q, k, v = q.half(), k.half(), v.half()
    with pytest.raises(AssertionError, match="rounds bfloat16 to 8 bits, no other numbers"):
        attend(q, k, v, layout, None, 2, "causal", Launch(), v_scales=quantize(v).scales)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    with pytest.raises(AssertionError, match="needs a place for its result"):
        attend(q, k, v, layout, None, 2, "causal", Launch(), stores=False)
