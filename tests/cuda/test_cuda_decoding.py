"""Attention of decoding steps in CUDA C++, emulated: against the formula in fp64, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoding_emulation import EAGER, LATE, RANDOM, attend
from op_cases import DTYPES, assert_near
from torch import Tensor

from beit3_fast.parity import op_parity
from beit3_fast.reference.cached_attention import cached_attention as formula

# Sequences, rows of each, keys, those that every row sees, samples of the cache, processors.
SHAPES: dict[str, tuple[int, int, int, int, list[int] | None, int]] = {
    "one row, one key": (1, 1, 1, 0, None, 1),
    "first step": (2, 2, 39, 37, None, 1),
    "three beams": (2, 6, 51, 37, [2, 0], 1),
    "a lone image on many processors": (1, 6, 200, 197, None, 200),
    "a tile and a row": (1, 17, 33, 16, [1], 4),
    "no front": (2, 3, 18, 0, None, 4),
    "nothing but front": (1, 16, 80, 80, None, 1),
}
HEADS = ((2, 64), (1, 88))


def operands(
    shape: str, heads: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, a slice of fused rows; k and v, the first keys of a longer cache, behind which lies NaN; seen."""
    sequences, rows, keys, front, samples, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(keys)
    width = heads[0] * heads[1]
    count = max(samples or range(sequences)) + 1
    fused = torch.randn(sequences, rows + 2, 3 * width, generator=generator) * 2
    cache = torch.randn(2, count, keys + 5, width, generator=generator) + 0.5
    cache[:, :, keys:] = torch.nan
    k, v = cache.to(dtype)[:, :, :keys]
    seen = torch.rand(sequences, rows, keys - front + 3, generator=generator) > 0.4
    return fused.to(dtype)[:, 2:, width : 2 * width], k, v, seen[:, :, : keys - front]


def whole(seen: Tensor, front: int) -> Tensor:
    return F.pad(seen, (front, 0), value=True)


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, num_heads: int) -> Tensor:
    q, k, v = (t.unflatten(2, (num_heads, -1)).transpose(1, 2).contiguous() for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
    return torch.where(seen.any(2)[:, None, :, None], o, 0.0).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(shape: str, dtype: str, heads: tuple[int, int]) -> None:
    _, _, _, front, samples, processors = SHAPES[shape]
    q, k, v, seen = operands(shape, heads, DTYPES[dtype])
    own = samples or list(range(len(q)))
    seen_all = whole(seen, front)
    exact = [t.double() for t in (q, k, v)]
    truth = formula(*exact, seen_all, own, heads[0], heads[1] ** -0.5)
    done = attend(q, k, v, seen, heads[0], front=front, samples=samples, processors=processors)
    peer = plain(q, k[own], v[own], seen_all, heads[0])
    assert_near(op_parity(done, peer, truth), (shape, dtype, heads))


@pytest.mark.parametrize("heads", HEADS)
def test_a_row_that_sees_nothing_gives_zeros(heads: tuple[int, int]) -> None:
    q, k, v, seen = operands("no front", heads, torch.bfloat16)
    seen[1, 2] = False
    done = attend(q, k, v, seen, heads[0])
    assert not done[1, 2].any()
    assert done.isfinite().all()
    assert done[:, :2].abs().amin() > 0


@pytest.mark.parametrize("processors", [1, 200])
def test_nothing_of_another_sample_row_or_head_is_seen(processors: int) -> None:
    """NaN in the keys of the other sample, the other head and the other rows changes no bit."""
    heads = (2, 64)
    q, k, v, seen = operands("three beams", heads, torch.bfloat16)
    options: dict[str, Any] = {"front": 37, "samples": [2, 0], "processors": processors}
    clean = attend(q, k, v, seen, 2, **options)
    q, k, v = (t.clone() for t in (q, k, v))
    for t in (k, v):
        t[0] = t[1] = torch.nan
        t[:, :, 64:] = torch.nan
    q[0, 1] = torch.nan
    done = attend(q, k, v, seen, 2, **options)
    rows = torch.tensor([0, 2, 3, 4, 5])
    assert torch.equal(done[0, rows, :64], clean[0, rows, :64])
    assert done[0, 1].isnan().all()
    assert done[1].isnan().all()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shape", ["three beams", "a tile and a row"])
def test_new_keys_are_written_first(shape: str, heads: tuple[int, int], on_device: bool) -> None:
    """As if they had been there; the rest of the cache keeps its bits, and places behind it are left out."""
    _, _, keys, front, samples, processors = SHAPES[shape]
    q, k, v, seen = operands(shape, heads, torch.bfloat16)
    options: dict[str, Any] = {"front": front, "samples": samples, "processors": processors}
    for begin, count in ((front, 5), (keys - 2, 2), (keys - 2, 5)):
        fused = torch.randn(len(q), count + 1, 3 * k.shape[2]).bfloat16()[:, 1:]
        new_k, new_v = fused.chunk(3, dim=2)[1:]
        expected = [t.clone() for t in (k, v)]
        for cache, new in zip(expected, (new_k, new_v), strict=True):
            cache[samples, begin : begin + count] = new[:, : keys - begin]
        place = torch.tensor([begin]) if on_device else begin
        now = [t.clone() for t in (k, v)]
        done = attend(q, *now, seen, heads[0], new=(new_k, new_v, place), **options)
        assert all(torch.equal(*pair) for pair in zip(now, expected, strict=True))
        assert torch.equal(done, attend(q, *expected, seen, heads[0], **options))


def test_the_order_of_events_changes_no_bit() -> None:
    q, k, v, seen = operands("first step", (2, 64), torch.float16)
    first = attend(q, k, v, seen, 2, front=37)
    for order, seed in ((EAGER, 0), (LATE, 0), (RANDOM, 7)):
        assert torch.equal(attend(q, k, v, seen, 2, front=37, order=order, seed=seed), first)


def test_a_scale_of_zero_gives_the_mean_of_what_is_seen() -> None:
    q, k, v, seen = operands("no front", (1, 88), torch.bfloat16)
    done = attend(q, k, v, seen, 1, scale=0.0)
    mean = (seen.double() @ v.double()) / seen.sum(2, keepdim=True)
    torch.testing.assert_close(done.double(), mean, rtol=1e-2, atol=1e-3)


def test_what_the_kernel_does_not_take_is_named() -> None:
    q, k, v, seen = operands("no front", (2, 64), torch.bfloat16)
    with pytest.raises(AssertionError, match="heads of 64 or 88 columns"):
        attend(q, k, v, seen, 4)
    with pytest.raises(AssertionError, match="multiples of 16 bytes"):
        attend(q, k.as_strided(k.shape, (k.stride(0), 4, 1)), v, seen, 2)
    with pytest.raises(AssertionError, match="a front of at most all keys"):
        attend(q, k, v, seen, 2, front=19)
