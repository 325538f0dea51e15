"""cached_attention by PyTorch's own attention: one call for all sequences, or one for each of them on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    samples: Sequence[int],
    num_heads: int,
    scale: float,
) -> Tensor:
    """Arguments and result as in ``beit3_fast.reference.cached_attention``; obeys autocast and autograd.

    No key is copied where every cache sample has its own sequence, nor on a CPU, which takes one call a sequence.
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        groups = [(slice(None), slice(None) if _is_whole(samples, len(k)) else list(samples))]
    else:
        groups = [(slice(i, i + 1), slice(own, own + 1)) for i, own in enumerate(samples)]
    parts = []
    for place, own in groups:
        own_q, own_k, own_v = (
            t.unflatten(2, (num_heads, -1)).transpose(1, 2) for t in (q[place], k[own], v[own])
        )
        visible = seen[place]
        o = F.scaled_dot_product_attention(
            own_q, own_k, own_v, attn_mask=visible[:, None], scale=scale
        )
        o = torch.where(visible.any(dim=2)[:, None, :, None], o, 0.0)  # [S, H, n, D]
        parts.append(o.transpose(1, 2).flatten(2))
    return torch.cat(parts) if parts else q.clone()


def _is_whole(samples: Sequence[int], count: int) -> bool:
    return list(samples) == list(range(count))
