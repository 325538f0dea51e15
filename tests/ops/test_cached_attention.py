"""cached_attention: every implementation against the formula in fp64, and no key copied."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, TARGETS, assert_near
from torch import Tensor

from beit3_fast.errors import KernelUnavailable
from beit3_fast.ops import NewKeys, cached_attention
from beit3_fast.parity import op_parity
from beit3_fast.reference.cached_attention import cached_attention as formula

HEADS, WIDTH = 3, 48


def operands(dtype: torch.dtype, samples: list[int], rows: int = 5, keys: int = 17) -> list[Tensor]:
    """q [S, rows, C]; k and v, the first ``keys`` of a longer cache of four samples; seen, one row blind."""
    generator = torch.Generator().manual_seed(rows + keys)
    q = torch.randn(len(samples), rows, WIDTH, generator=generator)
    cache = torch.randn(2, 4, keys + 6, WIDTH, generator=generator) * 2
    seen = torch.rand(len(samples), rows, keys, generator=generator) > 0.4
    seen[0, -1] = False
    k, v = cache.to(dtype)[:, :, :keys]
    return [q.to(dtype), k, v, seen]


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """PyTorch's own call on copies; a blind row gives zeros."""
    q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2).contiguous() for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
    return torch.where(seen.any(2)[:, None, :, None], o, 0.0).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("samples", [[0, 1, 2, 3], [3, 1], [2]])
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        *product(("auto", "composite", "reference"), DTYPES),
        *((impl, dtype) for impl, dtype in TARGETS if impl == "cpu"),
    ],
)
@torch.no_grad()
def test_against_the_formula(impl: str, dtype: str, samples: list[int]) -> None:
    q, k, v, seen = operands(DTYPES[dtype], samples)
    exact = [t.double() for t in (q, k, v)]
    truth = formula(*exact, seen, samples, HEADS, (WIDTH // HEADS) ** -0.5)
    given = None if samples == [0, 1, 2, 3] else samples
    ours = cached_attention(q, k, v, seen, num_heads=HEADS, samples=given, impl=impl)
    assert_near(op_parity(ours, plain(q, k[samples], v[samples], seen), truth), (impl, dtype))
    assert not ours[0, -1].any()


@pytest.mark.parametrize("samples", [None, [2, 0]])
@pytest.mark.parametrize("impl", ["auto", "composite", "reference"])
@torch.no_grad()
def test_new_keys_are_written_first(impl: str, samples: list[int] | None) -> None:
    """Where an integer or a tensor says, into the samples of the sequences and nowhere else."""
    own = [0, 1, 2, 3] if samples is None else samples
    q, k, v, seen = operands(torch.float32, own)
    rows = torch.randn(2, len(own), 3, WIDTH)
    expected = [t.clone() for t in (k, v)]
    for cache, new in zip(expected, rows, strict=True):
        cache[own, 9:12] = new
    options: dict[str, Any] = {"num_heads": HEADS, "samples": samples, "impl": impl}
    o = cached_attention(q, *expected, seen, **options)
    for place in (9, torch.tensor([9])):
        now = [t.clone() for t in (k, v)]
        done = cached_attention(q, *now, seen, new=NewKeys(*rows, place), **options)
        assert torch.equal(done, o)
        assert all(torch.equal(*pair) for pair in zip(now, expected, strict=True))


@pytest.mark.parametrize("impl", ["auto", "composite", "reference"])
@torch.no_grad()
def test_a_front_that_every_row_sees(impl: str) -> None:
    q, k, v, seen = operands(torch.float32, [3, 1])
    seen[:, :, :7] = True
    options: dict[str, Any] = {"num_heads": HEADS, "samples": [3, 1], "impl": impl}
    expected = cached_attention(q, k, v, seen, **options)
    assert torch.equal(cached_attention(q, k, v, seen[:, :, 7:], front=7, **options), expected)


def test_the_formula_itself() -> None:
    """Two keys, one of them seen: its value comes back whatever the scores are."""
    q, k, v, _ = operands(torch.float64, [1], rows=1, keys=2)
    seen = torch.tensor([[[False, True]]])
    assert torch.allclose(formula(q, k, v, seen, [1], HEADS, 1.0)[0, 0], v[1, 1])
    seen = torch.ones(1, 1, 2, dtype=torch.bool)
    scores = (q[0, 0] * k[1]).unflatten(1, (HEADS, -1)).sum(2)  # [2, H]
    expected = (scores.softmax(0)[:, :, None] * v[1].unflatten(1, (HEADS, -1))).sum(0).flatten()
    assert torch.allclose(formula(q, k, v, seen, [1], HEADS, 1.0)[0, 0], expected)


def test_gradients() -> None:
    q, k, v, seen = operands(torch.float64, [3, 1], rows=2, keys=3)
    tensors = [t.clone().requires_grad_() for t in (q, k, v)]

    def call(*own: Tensor) -> Tensor:
        return cached_attention(*own, seen, num_heads=HEADS, samples=[3, 1], impl="composite")

    assert torch.autograd.gradcheck(call, tensors)


def test_no_key_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys that PyTorch's attention gets lie in the cache, whichever samples are left."""
    q, k, v, seen = operands(torch.float32, [3, 1])
    given: list[int] = []
    real = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        given.extend(t.untyped_storage().data_ptr() for t in (k, v))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    cached_attention(q, k, v, seen, num_heads=HEADS, samples=[3, 1], impl="composite")
    assert set(given) == {k.untyped_storage().data_ptr()} == {v.untyped_storage().data_ptr()}


def test_cpu_kernels_say_why_not() -> None:
    q, k, v, seen = operands(torch.float32, [3, 1])
    with pytest.raises(KernelUnavailable, match="no gradients of cached keys"):
        cached_attention(
            q.requires_grad_(), k, v, seen, num_heads=HEADS, samples=[3, 1], impl="cpu"
        )
    auto = cached_attention(q, k, v, seen, num_heads=HEADS, samples=[3, 1])
    assert auto.requires_grad
