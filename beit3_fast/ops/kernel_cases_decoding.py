"""The small calls on which the CUDA kernels of captioning steps are checked on a user's machine (see kernel_cases.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from beit3_fast.composite.cached_attention import cached_attention as composite_attention
from beit3_fast.composite.head_top_k import likeliest
from beit3_fast.ops import cuda_decoding
from beit3_fast.parity import Parity, op_parity
from beit3_fast.reference.cached_attention import cached_attention as attention_formula
from beit3_fast.reference.head_top_k import head_top_k as head_formula

# Sequences, rows of each, keys, those that every row sees, samples, heads, head width: many blocks and few, one warp's
# keys and all warps', more rows than a tile.
_ATTENTION: tuple[tuple[int, int, int, int, list[int] | None, int, int], ...] = (
    (1, 2, 5, 3, None, 1, 64),
    (3, 6, 951, 901, [2, 0, 1], 2, 64),
    (2, 17, 230, 197, None, 2, 88),
    (200, 6, 220, 197, None, 4, 64),
)
# Rows, features, classes, how many are named.
_HEAD = ((3, 72, 700, 9), (49, 136, 64010, 3), (2, 768, 64010, 32))


def cuda_cached_attention(dtype: torch.dtype, device: str) -> dict[str, Parity]:
    """Rows of captions against the cache of their images."""
    generator, parities = torch.Generator().manual_seed(0), {}
    for sequences, rows, keys, front, samples, heads, width in _ATTENTION:
        own = list(range(sequences)) if samples is None else samples
        q = 2 * torch.randn(sequences, rows, heads * width, generator=generator)
        cache = torch.randn(2, sequences, keys + 3, heads * width, generator=generator)
        q, cache = q.to(dtype), cache.to(dtype)
        seen = torch.rand(sequences, rows, keys - front, generator=generator) > 0.5
        whole = torch.nn.functional.pad(seen, (front, 0), value=True)
        tail = (whole, own, heads, width**-0.5)
        k, v = cache[:, :, :keys]
        plain = composite_attention(q, k, v, *tail)
        truth = attention_formula(q.double(), k.double(), v.double(), *tail)
        k, v = cache.to(device)[:, :, :keys]
        named = None if samples is None else torch.tensor(own, dtype=torch.int32, device=device)
        # The last keys of all come with the call.
        new = [t[own, keys - 2 :].clone() for t in (k, v)]
        k[:, keys - 2 :], v[:, keys - 2 :] = float("nan"), float("nan")
        place = torch.tensor([keys - 2], device=device)
        rest = (named, *new, place, 0, front, heads, width**-0.5)
        o, moments = cuda_decoding.cached_attention(q.to(device), k, v, seen.to(device), *rest)
        name = f"{sequences} of {rows} rows, {keys} keys"
        o = o.cpu()
        parities[name] = op_parity(o, plain, truth)
        # Those of the rows as they were stored.
        left = (_moments(t, heads) for t in (o, o.double()))
        parities[f"statistics, {name}"] = op_parity(moments.cpu(), *left)
    return parities


def cuda_head_top_k(dtype: torch.dtype, device: str) -> dict[str, Parity]:
    """The log probabilities that are named, and how likely the named classes are."""
    generator, parities = torch.Generator().manual_seed(0), {}
    for rows, features, classes, count in _HEAD:
        x = torch.randn(rows, features, generator=generator).to(dtype)
        weight = (torch.randn(classes, features, generator=generator) * features**-0.5).to(dtype)
        bias = torch.randn(classes, generator=generator).to(dtype)
        allowed = torch.rand(classes, generator=generator) > 0.3
        plain = likeliest(torch.nn.functional.linear(x, weight, bias), count, allowed)
        exact = (x.double(), weight.double(), bias.double())
        every, order = head_formula(*exact, allowed, classes)
        by_class = torch.empty_like(every).scatter(1, order, every)
        there = (t.to(device) for t in (x, weight, bias, allowed))
        found = [t.cpu() for t in cuda_decoding.head_top_k(*there, count)]
        name, truth = f"{rows} rows, {classes} classes", every[:, :count]
        parities[f"log p, {name}"] = op_parity(found[0], plain[0], truth)
        ours, theirs = (_likelihood(by_class, ids) for ids in (found[1], plain[1]))
        parities[f"classes, {name}"] = op_parity(ours, theirs, truth)
    return parities


def _moments(o: Tensor, heads: int) -> Tensor:
    """Mean and sum of squared deviations of every head of rows [S, n, C], in fp32 or fp64."""
    own = o.flatten(0, 1).unflatten(1, (heads, -1))
    own = own if own.dtype is torch.float64 else own.float()
    mean = own.mean(2)
    return torch.stack([mean, (own - mean[..., None]).square().sum(2)], dim=2)


def _likelihood(by_class: Tensor, ids: Tensor) -> Tensor:
    """The exact log p of classes, -inf for what is none."""
    is_class = (ids >= 0) & (ids < by_class.shape[1])
    found = by_class.gather(1, ids.where(is_class, 0))
    return found.masked_fill(~is_class, float("-inf")).float()
