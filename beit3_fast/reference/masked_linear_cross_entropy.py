"""masked_linear_cross_entropy by its formula: the loss of a linear head over the named rows."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    label_smoothing: float,
) -> Tensor:
    """loss[m] = (1 - s) (L - z_target) + s mean_v (L - z_v), L = log sum_v exp(z_v), z = x[rows[m]] W^T + b, s the smoothing.

    x [R, D], weight [V, D], bias [V], rows and targets int64 [M]; losses [M] in fp32, in fp64 for fp64 operands.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    logits = x[rows].to(compute) @ weight.to(compute).T
    if bias is not None:
        logits = logits + bias.to(compute)
    top = logits.detach().amax(1, keepdim=True)
    log_total = (logits - top).exp().sum(1).log() + top[:, 0]
    surprise = log_total[:, None] - logits
    losses = surprise.gather(1, targets[:, None])[:, 0]
    if label_smoothing:  # without it, a class may have a logit of minus infinity
        losses = (1.0 - label_smoothing) * losses + label_smoothing * surprise.mean(1)
    return losses
