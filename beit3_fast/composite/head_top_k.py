"""head_top_k from logits that lie in memory."""

from __future__ import annotations

from torch import Tensor


def likeliest(logits: Tensor, count: int, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log p (fp32 at least) and ids [..., count] of the likeliest allowed classes of logits [..., V], best first.

    ``allowed`` bool [V]; classes that are not allowed count in the softmax. A single one is the lowest of equals, more
    come in the order of torch.topk.
    """
    logits = logits.double() if logits.element_size() == 8 else logits.float()
    total = logits.logsumexp(dim=-1, keepdim=True)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    if count == 1:
        best, ids = logits.max(dim=-1, keepdim=True)
    else:
        best, ids = logits.topk(count, dim=-1)
    return best - total, ids
