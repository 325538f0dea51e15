"""masked_linear_cross_entropy from PyTorch's products: one slice of the vocabulary at a time has logits.

The forward pass keeps two numbers for each row, the largest of its logits and the sum of their exponentials below
it (one log-sum-exp would lose the digits of a softmax whose logits are in the hundreds). With them a softmax is
known wherever its logits are, so the backward pass computes these again, by the same products of the same slices:
others would round otherwise, and a saturated softmax would no longer be one. The gradients of a slice's weights and
biases are then complete, with one rounding and no buffer in fp32 beside them.

The other common way, all gradients in the forward pass, saves the second product of the logits (one of four), but
holds a gradient [V, D] until the backward pass, knows no gradient of single losses, and computes gradients that
nobody may ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of a slice (64 MiB in fp32), and the thinnest slice of the vocabulary that is still a good product.
_LOGITS = 1 << 24
_THINNEST = 256


def masked_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """The losses [M], and [M, 2] the largest logit and the sum of exp(logit - it), in fp32 (fp64 for fp64 operands).

    Arguments as in ``beit3_fast.reference.masked_linear_cross_entropy``.
    """
    named = x[rows]
    compute = torch.promote_types(x.dtype, torch.float32)
    top = torch.full(rows.shape, torch.finfo(compute).min, dtype=compute, device=x.device)
    total, hit, mean = (torch.zeros_like(top) for _ in range(3))
    for own in _slices(len(named), len(weight)):
        logits = _logits(named, weight, bias, own)
        inside, column = _targets_in(own, targets)
        hit += logits.gather(1, column[:, None])[:, 0].where(inside, 0.0)
        if label_smoothing:
            mean += logits.sum(1) / len(weight)
        new_top = torch.maximum(top, logits.amax(1))
        total *= (top - new_top).exp_()
        total += logits.sub_(new_top[:, None]).exp_().sum(1)
        top = new_top
    losses = total.log() + (top - hit)
    if label_smoothing:
        losses += label_smoothing * (hit - mean)
    return losses, torch.stack([top, total], dim=1)


Slopes = Callable[[slice], tuple[Tensor, Tensor | None]]


def masked_linear_cross_entropy_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    peaks: Tensor,
    label_smoothing: float,
    slopes: Slopes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, given that of the losses [M] and what the forward pass kept, ``peaks`` [M, 2].

    Rows that ``rows`` does not name have a gradient of zero; without a bias its gradient has no elements. ``slopes``
    may stand for this file's own way to the gradient of a slice of the logits: [M, v] in x's dtype, and with a bias
    its column sums.
    """
    named = x[rows]
    if slopes is None:
        slopes = partial(_slopes, grad, named, weight, bias, targets, peaks, label_smoothing)
    dnamed = torch.zeros(named.shape, dtype=peaks.dtype, device=x.device)
    dweight = weight.new_empty(weight.shape)
    dbias = weight.new_empty(0 if bias is None else len(weight))
    for own in _slices(len(named), len(weight)):
        slope, sums = slopes(own)
        if sums is not None:
            dbias[own] = sums
        torch.mm(slope.T, named, out=dweight[own])
        dnamed += slope @ weight[own]
    dx, dnamed = x.new_zeros(x.shape), dnamed.to(x.dtype)
    if x.is_cuda:
        # index_add_ adds by atomics there: rows that are named more than once would differ from run to run.
        dx.index_put_((rows,), dnamed, accumulate=True)
    else:
        dx.index_add_(0, rows, dnamed)
    return dx, dweight, dbias


def _slopes(
    grad: Tensor,
    named: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    peaks: Tensor,
    label_smoothing: float,
    own: slice,
) -> tuple[Tensor, Tensor | None]:
    top, total = peaks.split(1, dim=1)
    slope = _logits(named, weight, bias, own).sub_(top).exp_().div_(total)
    slope -= label_smoothing / len(weight)
    inside, column = _targets_in(own, targets)
    place = torch.arange(len(named), device=named.device)
    slope[place, column] -= (1.0 - label_smoothing) * inside
    slope *= grad[:, None]
    return slope.to(named.dtype), None if bias is None else slope.sum(0)


def _slices(count: int, vocabulary: int) -> Iterator[slice]:
    """Slices of the vocabulary, the same in both passes."""
    step = max(_THINNEST, _LOGITS // max(1, count))
    for first in range(0, vocabulary, step):
        yield slice(first, min(first + step, vocabulary))


def _logits(named: Tensor, weight: Tensor, bias: Tensor | None, own: slice) -> Tensor:
    """[M, v] of a slice, in fp32 or fp64."""
    logits = F.linear(named, weight[own], None if bias is None else bias[own])
    return logits.to(torch.promote_types(named.dtype, torch.float32))


def _targets_in(own: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets lie in a slice of the vocabulary, and their column there (any, for the others)."""
    inside = (targets >= own.start) & (targets < own.stop)
    return inside, (targets - own.start).clamp(0, own.stop - own.start - 1)
