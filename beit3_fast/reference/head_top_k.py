"""head_top_k as a formula: the logarithm of the softmax of a linear head, and its highest values."""

from __future__ import annotations

import torch
from torch import Tensor


def head_top_k(
    x: Tensor, weight: Tensor, bias: Tensor | None, allowed: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """Log p and ids [R, count] of the likeliest allowed classes of x [R, D] under weight [V, D] and bias [V].

    Equals come in ascending order. Computed in fp32, in fp64 for fp64 operands.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    z = x.to(compute) @ weight.to(compute).T
    if bias is not None:
        z = z + bias.to(compute)
    log_p = z - z.logsumexp(1, keepdim=True)
    if allowed is not None:
        log_p = log_p.masked_fill(~allowed, float("-inf"))
    best, ids = log_p.sort(dim=1, descending=True, stable=True)
    return best[:, :count], ids[:, :count]
