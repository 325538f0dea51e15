"""cached_attention as a formula: the softmax of a few new rows over the keys that they see of a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3_fast.reference.shared_attention import attend


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    samples: Sequence[int],
    num_heads: int,
    scale: float,
) -> Tensor:
    """softmax(scale Q K^T) V, sequence s against cache sample samples[s], keys where ``seen``.

    q [S, n, C], k and v [B, N, C], seen bool [S, n, N] -> [S, n, C]; a query without a visible key gives zeros.
    Computed in fp32, in fp64 for fp64 operands.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    for place, sample in enumerate(samples):
        own_q, own_k, own_v = (
            t.to(compute).unflatten(1, (num_heads, -1)) for t in (q[place], k[sample], v[sample])
        )
        out[place] = attend(own_q, own_k, own_v, seen[place], scale).to(q.dtype)
    return out
