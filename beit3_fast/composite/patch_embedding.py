"""patch_embedding from PyTorch calls around one product of gathered patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def patch_embedding(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor,
    mask_token: Tensor,
    masked: Tensor | None,
    product: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """As ``beit3_fast.reference.patch_embedding`` without positions; obeys autocast and autograd.

    ``product``: patches [M, K * P * P] and bias -> [M, C], the product with the weight.
    """
    batch, channels, height, width = images.shape
    size = weight.shape[-1]
    rows, columns = height // size, width // size
    patches = images.reshape(batch, channels, rows, size, columns, size)
    patches = patches.permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch * rows * columns, channels * size * size)
    x = product(patches, bias).unflatten(0, (batch, rows * columns))
    if masked is not None:
        x = torch.where(masked.unsqueeze(-1), mask_token, x)
    # Under autocast x is of lower precision: the sum of all layers starts in the parameters' dtype.
    return torch.cat([cls_token.expand(batch, 1, -1), x], dim=1)
